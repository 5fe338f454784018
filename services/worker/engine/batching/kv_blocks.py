"""Bookkeeping of the paged KV cache: whose a block is, and which tokens it is known to hold. Pure.

    empty --take--> owned by 1..n --last owner gone--> idle (its tokens are known) or empty
      ^               ^                                  |
      |               +------------- revived ------------+
      +------------------ forgotten, least recently used first, when blocks are short

Only full blocks are known and shared, and nobody writes into a full block: sharing never copies.
"""

from collections import Counter, OrderedDict
from collections.abc import Hashable, Iterable, Sequence

BLOCK_TOKENS = 16
"""Tokens in one block."""


def blocks_for(tokens: int) -> int:
    """Blocks that hold `tokens` tokens."""
    return -(-tokens // BLOCK_TOKENS)


class KvBlocks:
    """A pool of equal blocks. Every block is empty, idle, or in at least one owner's table."""

    def __init__(self, total_blocks: int) -> None:
        assert total_blocks >= 1
        self._total = total_blocks
        self._empty = list(range(total_blocks - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._uses = [0] * total_blocks
        self._tables: dict[Hashable, list[int]] = {}
        self._key_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self._pinned: set[Hashable] = set()
        self._left: set[Hashable] = set()  # freed, but pinned

    @property
    def total_blocks(self) -> int:
        """Blocks in the pool."""
        return self._total

    @property
    def free_blocks(self) -> int:
        """Blocks that nobody has, empty or idle."""
        return len(self._empty) + len(self._idle)

    @property
    def capacity_tokens(self) -> int:
        """Most tokens of an owner that has the pool to itself."""
        return self._total * BLOCK_TOKENS

    def table(self, owner: Hashable) -> list[int]:
        """Blocks of `owner` in sequence order; the caller must not change it."""
        return self._tables.get(owner, [])

    def adopt(self, owner: Hashable, keys: Sequence[bytes]) -> int:
        """Begin the owner's table with the known blocks of the longest prefix of `keys`.

        Returns how many. The owner must have no blocks yet.
        """
        assert not self._tables.get(owner)
        table: list[int] = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            if self._uses[block] == 0:
                del self._idle[block]
            self._uses[block] += 1
            table.append(block)
        self._tables[owner] = table
        return len(table)

    def extend(self, owner: Hashable, tokens: int) -> bool:
        """Give `owner` blocks for `tokens` tokens altogether; False, and nothing done, if too few.

        A first call creates the owner's table.
        """
        table = self._tables.get(owner, [])
        missing = blocks_for(tokens) - len(table)
        if missing > self.free_blocks:
            return False
        for _ in range(missing):
            block = self._take()
            self._uses[block] = 1
            table.append(block)
        self._tables[owner] = table
        return True

    def shrink(self, owner: Hashable, tokens: int) -> None:
        """Take back the owner's blocks behind those for `tokens` tokens; none of them is known."""
        table = self._tables[owner]
        for block in reversed(table[blocks_for(tokens) :]):
            assert self._uses[block] == 1
            assert block not in self._key_of
            self._uses[block] = 0
            self._empty.append(block)
        del table[blocks_for(tokens) :]

    def learn(self, owner: Hashable, place: int, key: bytes) -> None:
        """Note that block `place` of the owner's table is full and what `key` stands for.

        Where another block is known by this key already, that one stays the known one.
        """
        block = self._tables[owner][place]
        if key not in self._block_of and block not in self._key_of:
            self._block_of[key] = block
            self._key_of[block] = key

    def count_freed(self, owners: Iterable[Hashable]) -> int:
        """How many more blocks would be free without these owners."""
        uses = Counter(block for owner in owners for block in self.table(owner))
        return sum(self._uses[block] == count for block, count in uses.items())

    def free(self, owner: Hashable) -> None:
        """Let go of all blocks of `owner`, pinned or not. Idempotent."""
        # A prefix is worth more than what follows on it: its end becomes least recently used.
        for block in reversed(self._tables.pop(owner, [])):
            self._uses[block] -= 1
            if self._uses[block] > 0:
                continue
            if block in self._key_of:
                self._idle[block] = None
            else:
                self._empty.append(block)

    def leave(self, owner: Hashable) -> None:
        """Note that the owner has ended: its blocks are freed, when it is pinned by `unpin`."""
        if owner in self._pinned:
            self._left.add(owner)
        else:
            self.free(owner)

    def pin(self, owner: Hashable) -> None:
        """Keep the owner's blocks, those to come included, when it ends. Idempotent."""
        self._pinned.add(owner)

    def unpin(self, owner: Hashable) -> None:
        """Undo `pin`, and free the blocks of an owner that has ended. Idempotent."""
        self._pinned.discard(owner)
        if owner in self._left:
            self._left.remove(owner)
            self.free(owner)

    def is_pinned(self, owner: Hashable) -> bool:
        """Whether the owner's blocks are to stay."""
        return owner in self._pinned

    def is_left(self, owner: Hashable) -> bool:
        """Whether the owner has ended and its blocks are there only because it is pinned."""
        return owner in self._left

    def check(self) -> None:
        """Assert that uses are counted right and that every block is in exactly one state."""
        uses = [0] * self._total
        for table in self._tables.values():
            assert len(set(table)) == len(table), "a block twice in one table"
            for block in table:
                uses[block] += 1
        assert uses == self._uses, "uses miscounted"
        owned = [block for block in range(self._total) if uses[block]]
        everything = sorted([*owned, *self._empty, *self._idle])
        assert everything == list(range(self._total)), "blocks lost or doubled"
        assert {key: block for block, key in self._key_of.items()} == self._block_of
        assert self._idle.keys() <= self._key_of.keys(), "an idle block is not known"
        assert not self._key_of.keys() & set(self._empty), "an empty block is known"
        assert self._left <= self._pinned

    def _take(self) -> int:
        """Return a block that nobody has, an empty one before a known one."""
        if self._empty:
            return self._empty.pop()
        block, _ = self._idle.popitem(last=False)
        del self._block_of[self._key_of.pop(block)]
        return block
