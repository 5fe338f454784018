"""The block pool: nothing lost, doubled or taken for another, whatever the order of calls."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from services.worker.engine.batching.kv_blocks import BLOCK_TOKENS, KvBlocks, blocks_for

TOTAL = 12


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (16, 1), (17, 2), (160, 10)])
def test_blocks_for(tokens, blocks):
    assert blocks_for(tokens) == blocks


def test_a_refused_extension_changes_nothing():
    pool = KvBlocks(3)
    assert pool.extend("a", 2 * BLOCK_TOKENS)
    table = list(pool.table("a"))
    assert not pool.extend("a", 4 * BLOCK_TOKENS)
    assert not pool.extend("b", 2 * BLOCK_TOKENS)
    assert pool.table("a") == table
    assert pool.free_blocks == 1
    pool.check()


def fill(pool, owner, keys):
    """Give `owner` full blocks that are known by these keys; return them."""
    assert pool.extend(owner, len(keys) * BLOCK_TOKENS)
    for place, key in enumerate(keys):
        pool.learn(owner, place, key)
    return list(pool.table(owner))


def test_freed_blocks_are_revived_by_their_keys():
    pool = KvBlocks(4)
    blocks = fill(pool, "a", [b"1", b"12", b"123"])
    pool.free("a")
    assert pool.free_blocks == 4
    assert pool.adopt("b", [b"1", b"12", b"1x"]) == 2
    assert pool.table("b") == blocks[:2]
    assert pool.free_blocks == 2
    assert pool.adopt("c", [b"12"]) == 1, "a key stands for itself, wherever it comes"
    assert [pool.count_freed(owners) for owners in ("b", "c", "bc")] == [1, 0, 2]
    pool.check()


@pytest.mark.parametrize(
    ("taken", "lost"),
    [(1, {b"12"}), (2, {b"12", b"23"}), (3, {b"12", b"23", b"2"}), (4, {b"12", b"23", b"2", b"1"})],
)
def test_the_end_of_what_was_used_longest_ago_is_forgotten_first(taken, lost):
    pool = KvBlocks(4)
    fill(pool, "a", [b"1", b"12"])
    fill(pool, "b", [b"2", b"23"])
    pool.free("a")
    pool.free("b")
    assert pool.adopt("a", [b"1"]) == 1
    pool.free("a")
    assert pool.extend("thief", taken * BLOCK_TOKENS)
    assert {key for key in (b"1", b"12", b"2", b"23") if not pool.adopt(key, [key])} == lost


def test_two_blocks_of_one_content_are_both_kept_and_one_is_known():
    pool = KvBlocks(4)
    first = fill(pool, "a", [b"1"])
    fill(pool, "b", [b"1"])
    pool.adopt("c", [b"1"])
    assert pool.table("c") == first
    pool.check()


def test_pinned_blocks_outlive_their_owner():
    pool = KvBlocks(2)
    pool.pin("a")
    pool.extend("a", 32)
    pool.leave("a")
    assert pool.is_left("a")
    assert not pool.extend("b", 1)
    pool.unpin("a")
    assert not pool.is_left("a")
    assert pool.free_blocks == 2
    pool.leave("b")
    pool.check()


class Pool(RuleBasedStateMachine):
    """Owners write texts; what is adopted must be what was written.

    An owner's text is a number, its key for a place a prefix of that number's digits: so texts
    share beginnings.
    """

    def __init__(self):
        super().__init__()
        self.pool = KvBlocks(TOTAL)
        self.content: dict[int, bytes] = {}
        self.texts: dict[str, bytes] = {}
        self.written: dict[str, int] = {}
        self.pinned: set[str] = set()
        self.left: set[str] = set()

    owners = st.sampled_from("abcd")
    texts_drawn = st.text("01", min_size=TOTAL, max_size=TOTAL).map(str.encode)

    @rule(owner=owners, text=texts_drawn)
    def begin(self, owner, text):
        if owner in self.texts or owner in self.left:
            return
        keys = [text[: place + 1] for place in range(TOTAL)]
        found = self.pool.adopt(owner, keys)
        table = self.pool.table(owner)
        assert [self.content[block] for block in table] == keys[:found]
        self.texts[owner], self.written[owner] = text, found

    @rule(owner=owners, tokens=st.integers(0, TOTAL * BLOCK_TOKENS + 5))
    def extend(self, owner, tokens):
        if owner not in self.texts:
            return
        had = list(self.pool.table(owner))
        missing = max(0, blocks_for(tokens) - len(had))
        fits = missing <= self.pool.free_blocks
        assert self.pool.extend(owner, tokens) == fits
        table = self.pool.table(owner)
        assert table[: len(had)] == had
        assert len(table) == len(had) + (missing if fits else 0)
        for block in table[len(had) :]:
            self.content.pop(block, None)

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def write(self, data):
        owner = data.draw(st.sampled_from(sorted(self.texts)))
        place = self.written[owner]
        if place < len(self.pool.table(owner)):
            key = self.texts[owner][: place + 1]
            self.content[self.pool.table(owner)[place]] = key
            self.pool.learn(owner, place, key)
            self.written[owner] += 1

    @rule(owner=owners, more=st.integers(0, 40))
    def shrink(self, owner, more):
        if owner not in self.texts or owner in self.left:
            return
        had, kept = list(self.pool.table(owner)), self.written[owner] * BLOCK_TOKENS + more
        self.pool.shrink(owner, kept)
        assert self.pool.table(owner) == had[: blocks_for(kept)]

    @rule(owner=owners)
    def free(self, owner):
        if owner not in self.left:
            self.pool.free(owner)
            self.texts.pop(owner, None)

    @rule(owner=owners)
    def leave(self, owner):
        if owner in self.texts:
            self.pool.leave(owner)
            if owner in self.pinned:
                self.left.add(owner)
            else:
                del self.texts[owner]

    @rule(owner=owners)
    def pin(self, owner):
        self.pool.pin(owner)
        self.pinned.add(owner)

    @rule(owner=owners)
    def unpin(self, owner):
        self.pool.unpin(owner)
        self.pinned.discard(owner)
        if owner in self.left:
            self.left.remove(owner)
            del self.texts[owner]

    @invariant()
    def holds(self):
        self.pool.check()
        taken = set()
        for owner, text in self.texts.items():
            table = self.pool.table(owner)
            taken |= set(table)
            for place in range(self.written[owner]):
                assert self.content[table[place]] == text[: place + 1]
        assert self.pool.free_blocks == TOTAL - len(taken)


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=40)
