"""The block pool: nothing lost, nothing doubled, whatever the order of calls."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from services.worker.kv_blocks import BLOCK_TOKENS, KvBlocks, blocks_for

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


class Pool(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.pool = KvBlocks(TOTAL)
        self.tokens: dict[str, int] = {}

    @rule(owner=st.sampled_from("abcd"), tokens=st.integers(0, TOTAL * BLOCK_TOKENS + 5))
    def extend(self, owner, tokens):
        before = self.tokens.get(owner, 0)
        missing = blocks_for(tokens) - blocks_for(before)
        had = list(self.pool.table(owner)) if owner in self.tokens else []
        fits = missing <= self.pool.free_blocks
        assert self.pool.extend(owner, tokens) == fits
        if fits:
            self.tokens[owner] = max(tokens, before)
            assert self.pool.table(owner)[: len(had)] == had

    @rule(owner=st.sampled_from("abcd"))
    def free(self, owner):
        self.pool.free(owner)
        self.tokens.pop(owner, None)

    @invariant()
    def holds(self):
        self.pool.check()
        held = sum(map(blocks_for, self.tokens.values()))
        assert self.pool.free_blocks == TOTAL - held


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=30)
