"""One stage's answer as text: pieces that are final, with their tokens' log-probabilities."""

from collections.abc import Sequence
from dataclasses import dataclass

from gearfall.core.generation.job import FinishReason, TokenAlternative, TokenRun
from services.router.generation import TokenText
from services.router.text.detokenizer import Detokenizer, StopScanner
from services.router.text.tokenizing import ModelTokenizer


@dataclass(frozen=True, slots=True)
class AnswerPiece:
    """Text that no later token changes, and the tokens that begin in it."""

    text: str
    logprobs: tuple[TokenText, ...]
    token_count: int
    """Tokens that came since the last piece."""


class AnswerText:
    """Turns one job's runs into pieces; stops at the first stop string."""

    def __init__(
        self,
        tokenizer: ModelTokenizer,
        *,
        stops: Sequence[str],
        stop_token_ids: Sequence[int],
        with_logprobs: bool,
    ) -> None:
        self._tokenizer = tokenizer
        self._detokenizer = Detokenizer(tokenizer.decode)
        self._scanner = StopScanner(stops)
        self._stop_token_ids = frozenset(stop_token_ids)
        self._with_logprobs = with_logprobs
        self._decoded = 0
        self._released = 0
        self._pending: list[TokenText] = []

    @property
    def stop_found(self) -> bool:
        """Whether a stop string ended the text: no token after it counts."""
        return self._scanner.found is not None

    def feed(self, run: TokenRun) -> AnswerPiece | None:
        """Return what became final with `run`, or None; a run with `finish` is the last."""
        shown = self._shown_count(run)
        text = ""
        for position in range(shown) if self._with_logprobs else ():
            self._pending.append(self._token_text(run, position))
            text += self._scan(self._detokenizer.feed(run.token_ids[position : position + 1]))
            if self.stop_found:
                break
        if not self._with_logprobs and shown:
            text = self._scan(self._detokenizer.feed(run.token_ids[:shown]))
        if run.finish is not None and not self.stop_found:
            text += self._scan(self._detokenizer.flush())
            text += "" if self.stop_found else self._scanner.flush()
        return self._piece(text, len(run.token_ids), is_last=run.finish is not None)

    def _scan(self, decoded: str) -> str:
        self._decoded += len(decoded)
        return self._scanner.feed(decoded) if decoded else ""

    def _shown_count(self, run: TokenRun) -> int:
        """Tokens of the run that belong to the text: all but a stop token at the end."""
        count = len(run.token_ids)
        ends_with_stop = run.finish is FinishReason.STOP and count > 0
        return count - 1 if ends_with_stop and run.token_ids[-1] in self._stop_token_ids else count

    def _piece(self, text: str, token_count: int, *, is_last: bool) -> AnswerPiece | None:
        self._released += len(text)
        logprobs = self._release_tokens(is_last=is_last)
        if not text and not logprobs:
            return None
        return AnswerPiece(text, logprobs, token_count)

    def _release_tokens(self, *, is_last: bool) -> tuple[TokenText, ...]:
        if not self._pending:
            return ()
        if self.stop_found:
            ready = [each for each in self._pending if each.text_offset < self._released]
        elif is_last or self._released == self._decoded:
            ready = self._pending
        else:
            ready = [each for each in self._pending if each.text_offset < self._released]
        self._pending = [] if self.stop_found else self._pending[len(ready) :]
        return tuple(ready)

    def _token_text(self, run: TokenRun, position: int) -> TokenText:
        alternatives: Sequence[TokenAlternative] = (
            run.alternatives[position] if run.alternatives else ()
        )
        return self._text_of(
            run.token_ids[position],
            run.logprobs[position],
            tuple(self._text_of(each.token_id, each.logprob) for each in alternatives),
        )

    def _text_of(self, token_id: int, logprob: float, top: tuple[TokenText, ...] = ()) -> TokenText:
        text, token_bytes = self._tokenizer.token_text(token_id)
        return TokenText(token_id, text, token_bytes, logprob, self._decoded, top)
