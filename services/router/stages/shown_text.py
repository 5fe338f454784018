"""What a client has of one choice's text: it grows by pieces and is void once it is replaced."""

from collections.abc import Callable

from services.router.generation import Delta, GenerationEvent, Replace
from services.router.text.answer_text import AnswerPiece


class ShownText:
    """Tells the client, and knows how much it has."""

    def __init__(self, choice: int, emit: Callable[[GenerationEvent], None]) -> None:
        self._choice = choice
        self._emit = emit
        self._characters = 0
        self._logprobs = 0

    def show(self, piece: AnswerPiece) -> None:
        """Give one more piece."""
        self._characters += len(piece.text)
        self._logprobs += len(piece.logprobs)
        self._emit(Delta(self._choice, piece.text, piece.logprobs, piece.token_count))

    def replace(self, model: str, next_model: str) -> int:
        """Take back all that `model` said, as `next_model` answers; return how many characters."""
        characters = self._characters
        self._emit(Replace(self._choice, model, next_model, characters, self._logprobs))
        self._characters = self._logprobs = 0
        return characters
