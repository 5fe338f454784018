"""A model whose next token is a checksum of everything before it, read back from a paged cache.

It fails loudly when a step's packing is wrong: what it reads was written by the steps before.
"""

import numpy as np

from services.worker.engine.batching.kv_blocks import BLOCK_TOKENS

VOCABULARY = 31


def answer(prompt, count):
    """What the model says to a prompt, greedily."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(_next(tokens))
    return tokens[len(prompt) :]


def _next(tokens):
    return sum((place + 1) * token for place, token in enumerate(tokens)) % VOCABULARY


class CountingModel:
    """Implements `services.worker.engine.engine.Model`."""

    vocabulary_size = VOCABULARY

    def __init__(self, total_blocks):
        self.cache = np.full((total_blocks, BLOCK_TOKENS), -1)
        self.steps = []
        self.poison = None

    def forward(self, step):
        self.steps.append(step)
        for token, place, row in zip(step.token_ids, step.positions, step.seq_index, strict=True):
            table = step.block_tables[row]
            self.cache[table[place // BLOCK_TOKENS], place % BLOCK_TOKENS] = token
        logits = np.zeros((len(step.logit_rows), VOCABULARY), dtype=np.float32)
        for number, row in enumerate(step.logit_rows):
            end = step.positions[row] + 1
            table = step.block_tables[step.seq_index[row]]
            tokens = self.cache[table].reshape(-1)[:end].tolist()
            assert -1 not in tokens
            logits[number, _next(tokens)] = 9.0
            if self.poison is not None and self.poison in tokens:
                logits[number] = np.nan
        return logits
