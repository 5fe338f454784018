"""The bytes that one token stands for, also when they are no whole character."""

import re
from collections.abc import Mapping
from typing import Any

_BYTE_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class ByteReader:
    """Reads a token's bytes by the decoder that the tokenizer declares."""

    def __init__(self, tokenizer_json: Mapping[str, Any]) -> None:
        """`tokenizer_json`: the parsed tokenizer.json."""
        self._byte_of = byte_level_alphabet() if _is_byte_level(tokenizer_json) else None

    def bytes_of(self, token: str, text: str) -> bytes:
        """Return the bytes of `token`, spelt as in the vocabulary; alone it decodes to `text`."""
        fallback = _BYTE_FALLBACK.fullmatch(token)
        if fallback:
            return bytes.fromhex(fallback[1])
        if self._byte_of is not None and token and all(each in self._byte_of for each in token):
            return bytes(self._byte_of[each] for each in token)
        return text.encode()


def _is_byte_level(tokenizer_json: Mapping[str, Any]) -> bool:
    decoder = tokenizer_json.get("decoder")
    if not isinstance(decoder, dict):
        return False
    parts = [decoder, *(decoder.get("decoders") or ())]
    return any(isinstance(part, dict) and part.get("type") == "ByteLevel" for part in parts)


def byte_level_alphabet() -> dict[str, int]:
    """GPT-2's byte alphabet: printable Latin-1 stands for itself, the rest from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    alphabet = {chr(byte): byte for byte in printable}
    alphabet |= {chr(0x100 + position): byte for position, byte in enumerate(others)}
    return alphabet
