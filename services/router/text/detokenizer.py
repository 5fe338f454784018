"""Text from tokens as they come: whole characters only, stop strings found across token borders."""

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]
"""Text of consecutive tokens, special tokens left out."""

_REPLACEMENT = "\ufffd"
_MAX_PENDING_TOKENS = 8
"""A character has at most four bytes: more undecodable tokens than this are not a character."""
_MAX_UNFINISHED_TOKENS = 3
"""Bytes, and so tokens, of a character that lacks its last."""


class Detokenizer:
    """Decodes one token sequence step by step; the pieces joined are the text of the whole.

    Some tokens decode differently behind others (leading spaces, byte pieces), so each step decodes
    a window that starts at the last border known to be clean and cuts off what was emitted.
    """

    __slots__ = ("_decode", "_emitted", "_emitted_text", "_window")

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._emitted = 0
        """Tokens of the window whose text is out."""
        self._emitted_text = ""
        """Text of those tokens."""

    def feed(self, token_ids: Sequence[int]) -> str:
        """Return the text that became final with these tokens."""
        return "".join([self._feed_one(token_id) for token_id in token_ids])

    def flush(self) -> str:
        """Return what is left when no token follows; an unfinished character becomes U+FFFD."""
        return self._advance(self._decode(self._window)) if self._window else ""

    def _feed_one(self, token_id: int) -> str:
        self._window.append(token_id)
        text = self._decode(self._window)
        if not text.endswith(_REPLACEMENT):
            return self._advance(text)
        if len(self._window) - self._emitted <= _MAX_PENDING_TOKENS:
            return ""
        return self._advance_before_a_character(text)

    def _advance_before_a_character(self, text: str) -> str:
        """Give up on what is no character, but for an end that may yet become one."""
        for count in range(_MAX_UNFINISHED_TOKENS, 0, -1):
            before = self._decode(self._window[:-count])
            if before + self._decode(self._window[-count:]) == text:
                return self._advance(before, kept=count)
        return self._advance(text)

    def _advance(self, text: str, kept: int = 0) -> str:
        """Emit `text`, which is that of the window without its last `kept` tokens."""
        piece = text[len(self._emitted_text) :]
        self._window = self._window[self._emitted :]
        self._emitted = len(self._window) - kept
        self._emitted_text = self._decode(self._window[: self._emitted])
        return piece


class StopScanner:
    """Looks for stop strings in a stream and holds back what may become one."""

    __slots__ = ("_held", "_stops", "found")

    def __init__(self, stops: Sequence[str]) -> None:
        assert all(stops), "a stop string is not empty"
        self._stops = tuple(stops)
        self._held = ""
        self.found: str | None = None
        """The stop string that ended the text."""

    def feed(self, text: str) -> str:
        """Return the text that can't be a part of a stop string; look at `found` afterwards."""
        if not self._stops:
            return text
        text = self._held + text
        hits = [(at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if hits:
            at, self.found = min(hits)
            self._held = ""
            return text[:at]
        keep = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """Return what was held back, when no text follows."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
