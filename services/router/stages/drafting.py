"""The draft that goes up with a request: a lower stage's answer in the larger model's tokens."""

import asyncio
from collections.abc import Sequence

from services.router.generation import Prompt
from services.router.stages.stage_plan import StageReady
from services.router.text.tokenizing import IN_LOOP_CHARACTERS, ModelTokenizer

_BORDER_TOKENS = 8
"""Tokens before an answer that may change how its first characters are written."""
_REPLACEMENT = "\ufffd"
"""Stands for a character that lacks its last bytes."""


async def draft_of(
    below: StageReady, answer: Sequence[int], above: StageReady, prompt: Prompt
) -> tuple[int, ...]:
    """Return what `above` is to verify of the tokens that `below` gave as its answer.

    The tokens themselves where they mean the same to both models, else those of their text, but for
    a last one that may have been cut. Empty where there is nothing to verify; never a token that
    the larger model does not have.
    """
    if below.tokenizer.vocabulary_key == above.tokenizer.vocabulary_key:
        return _known(answer, above)
    is_whole = bool(answer) and answer[-1] in below.record.eos_token_ids
    text = _text_behind(below.tokenizer, below.prompt_token_ids[-_BORDER_TOKENS:], answer)
    if not text.strip(_REPLACEMENT):
        return ()
    if len(above.prompt_token_ids) + len(text) <= IN_LOOP_CHARACTERS:
        token_ids = above.tokenizer.encode_answer(prompt, text)
    else:
        token_ids = await asyncio.to_thread(above.tokenizer.encode_answer, prompt, text)
    return _known(token_ids if is_whole else token_ids[:-1], above)


def _known(token_ids: Sequence[int], above: StageReady) -> tuple[int, ...]:
    """Return the tokens before the first that is none of the model's."""
    size = above.host.vocabulary_size
    strange = (at for at, token_id in enumerate(token_ids) if token_id >= size)
    return tuple(token_ids[: next(strange, len(token_ids))])


def _text_behind(tokenizer: ModelTokenizer, before: Sequence[int], answer: Sequence[int]) -> str:
    """Return an answer's whole characters as they read behind the prompt's last tokens."""
    start, text = tokenizer.decode(before), tokenizer.decode((*before, *answer))
    text = text[len(start) :] if text.startswith(start) else tokenizer.decode(answer)
    return text.rstrip(_REPLACEMENT)
