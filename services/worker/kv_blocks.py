"""Bookkeeping of the paged KV cache: which block belongs to which sequence. Pure."""

from collections.abc import Hashable

BLOCK_TOKENS = 16
"""Tokens in one block."""


def blocks_for(tokens: int) -> int:
    """Blocks that hold `tokens` tokens."""
    return -(-tokens // BLOCK_TOKENS)


class KvBlocks:
    """A pool of equal blocks. Every block is free or in exactly one sequence's table."""

    def __init__(self, total_blocks: int) -> None:
        assert total_blocks >= 1
        self._total = total_blocks
        self._free = list(range(total_blocks - 1, -1, -1))
        self._tables: dict[Hashable, list[int]] = {}

    @property
    def total_blocks(self) -> int:
        """Blocks in the pool."""
        return self._total

    @property
    def free_blocks(self) -> int:
        """Blocks that nobody has."""
        return len(self._free)

    @property
    def capacity_tokens(self) -> int:
        """Most tokens of a sequence that has the pool to itself."""
        return self._total * BLOCK_TOKENS

    def table(self, owner: Hashable) -> list[int]:
        """Blocks of `owner` in sequence order; the caller must not change it."""
        return self._tables[owner]

    def extend(self, owner: Hashable, tokens: int) -> bool:
        """Give `owner` blocks for `tokens` tokens altogether; False, and nothing done, if too few.

        A first call creates the owner's table. A table never shrinks.
        """
        table = self._tables.get(owner, [])
        missing = blocks_for(tokens) - len(table)
        if missing > len(self._free):
            return False
        for _ in range(missing):
            table.append(self._free.pop())
        self._tables[owner] = table
        return True

    def free(self, owner: Hashable) -> None:
        """Take all blocks of `owner` back. Idempotent."""
        self._free.extend(reversed(self._tables.pop(owner, [])))

    def check(self) -> None:
        """Assert that every block is free or owned once, and none is both."""
        owned = [block for table in self._tables.values() for block in table]
        assert sorted(owned + self._free) == list(range(self._total)), "blocks lost or doubled"
