"""How much of a partition is verified from its front on, its chunks coming in any order. Pure."""

from collections.abc import Sequence


class VerifiedFront:
    """Grows only; what lies before it is verified without a gap."""

    def __init__(self, chunk_sizes: Sequence[int]) -> None:
        """`chunk_sizes`: bytes of each chunk, in the partition's order."""
        self._sizes = chunk_sizes
        self._is_verified = [False] * len(chunk_sizes)
        self._chunks = 0
        self.size_bytes = 0
        """Verified from the front on."""

    def add(self, chunk: int) -> bool:
        """Note a verified chunk; return whether the front has moved."""
        assert not self._is_verified[chunk]
        self._is_verified[chunk] = True
        before = self._chunks
        while self._chunks < len(self._sizes) and self._is_verified[self._chunks]:
            self.size_bytes += self._sizes[self._chunks]
            self._chunks += 1
        return self._chunks > before
