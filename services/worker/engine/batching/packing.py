"""One step's chunks packed into flat arrays: what a forward pass is fed. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from services.worker.engine.batching.batch import Chunk
from services.worker.engine.batching.kv_blocks import KvBlocks


@dataclass(frozen=True, slots=True)
class AdapterRows:
    """Where the tokens stand that run with one LoRA adapter."""

    adapter: str
    tokens: NDArray[np.int64]
    """[n]: of the T packed tokens."""
    logits: NDArray[np.int64]
    """[m]: of the R rows whose logits are wanted."""


@dataclass(frozen=True, slots=True)
class PackedStep:
    """T tokens of S sequences side by side, without padding between them."""

    token_ids: NDArray[np.int64]
    """[T]"""
    positions: NDArray[np.int32]
    """[T]: place of each token in its sequence."""
    seq_index: NDArray[np.int32]
    """[T]: row of `block_tables`."""
    block_tables: NDArray[np.int32]
    """[S, max_blocks], rows padded with 0."""
    logit_rows: NDArray[np.int64]
    """[R]: tokens whose logits are wanted, in the order of the chunks and of their tokens."""
    adapters: tuple[AdapterRows, ...] = ()
    """One for each adapter in the step. Tokens that are in none run without."""
    exact_tokens: int = 0
    """So many of the first tokens are computed exactly, whatever the arithmetic of the others."""

    @property
    def exact_logits(self) -> int:
        """How many of the first logits are theirs."""
        return int((self.logit_rows < self.exact_tokens).sum())


def pack_step(chunks: Sequence[Chunk], blocks: KvBlocks) -> PackedStep:
    """Pack chunks in order; their sequences' blocks must reach to the end of each chunk."""
    token_ids: list[int] = []
    positions: list[int] = []
    seq_index: list[int] = []
    logit_rows: list[int] = []
    rows_of: dict[str, tuple[list[int], list[int]]] = {}
    tables = [blocks.table(chunk.sequence.key) for chunk in chunks]
    for row, chunk in enumerate(chunks):
        end = chunk.start + chunk.count
        if chunk.sequence.adapter:
            tokens, logits = rows_of.setdefault(chunk.sequence.adapter, ([], []))
            tokens += range(len(token_ids), len(token_ids) + chunk.count)
            logits += range(len(logit_rows), len(logit_rows) + chunk.rows)
        token_ids += chunk.token_ids
        positions += range(chunk.start, end)
        seq_index += [row] * chunk.count
        logit_rows += range(len(token_ids) - chunk.rows, len(token_ids))
    block_tables = np.zeros((len(tables), max(map(len, tables))), dtype=np.int32)
    for row, table in enumerate(tables):
        block_tables[row, : len(table)] = table
    return PackedStep(
        token_ids=np.array(token_ids, dtype=np.int64),
        positions=np.array(positions, dtype=np.int32),
        seq_index=np.array(seq_index, dtype=np.int32),
        block_tables=block_tables,
        logit_rows=np.array(logit_rows, dtype=np.int64),
        adapters=tuple(
            AdapterRows(adapter, np.array(tokens, np.int64), np.array(logits, np.int64))
            for adapter, (tokens, logits) in rows_of.items()
        ),
    )


def join_steps(first: PackedStep, second: PackedStep) -> PackedStep:
    """Return both as one step: its logits are those of `first`, then those of `second`.

    Neither may have rows with an adapter, the second no exact tokens.
    """
    assert not second.exact_tokens
    assert not first.adapters
    assert not second.adapters
    tables, tokens = len(first.block_tables), len(first.token_ids)
    width = max(first.block_tables.shape[1], second.block_tables.shape[1])
    return PackedStep(
        token_ids=np.concatenate([first.token_ids, second.token_ids]),
        positions=np.concatenate([first.positions, second.positions]),
        seq_index=np.concatenate([first.seq_index, second.seq_index + np.int32(tables)]),
        block_tables=np.concatenate(
            [
                np.pad(step.block_tables, ((0, 0), (0, width - step.block_tables.shape[1])))
                for step in (first, second)
            ]
        ),
        logit_rows=np.concatenate([first.logit_rows, second.logit_rows + tokens]),
        exact_tokens=first.exact_tokens,
    )
