"""Keys of blocks: equal for equal beginnings of one tenant and adapter, and only for those."""

from hypothesis import given
from hypothesis import strategies as st

from services.worker.engine.batching.kv_blocks import BLOCK_TOKENS
from services.worker.engine.batching.prefix_keys import extend_keys, root_key


def keys_of(tokens, tenant="t", adapter=""):
    keys = [root_key(tenant, adapter)]
    extend_keys(keys, tokens, len(tokens) // BLOCK_TOKENS)
    return keys[1:]


texts = st.lists(st.sampled_from([0, 7]), max_size=5 * BLOCK_TOKENS)


@given(one=texts, two=texts)
def test_keys_agree_as_far_as_full_blocks_do(one, two):
    for place, (mine, theirs) in enumerate(zip(keys_of(one), keys_of(two), strict=False)):
        end = (place + 1) * BLOCK_TOKENS
        assert (mine == theirs) == (one[:end] == two[:end])


@given(tokens=texts, cut=st.integers(0, 5))
def test_keys_do_not_hang_on_how_they_were_reached(tokens, cut):
    keys = [root_key("t", "")]
    full = len(tokens) // BLOCK_TOKENS
    extend_keys(keys, tokens, min(cut, full))
    extend_keys(keys, tokens, full)
    extend_keys(keys, tokens, max(0, full - 1))
    assert keys[1:] == keys_of(tokens)


def test_nothing_is_shared_between_tenants_or_adapters():
    tokens = [1] * BLOCK_TOKENS
    owners = [("", ""), ("t", ""), ("", "t"), ("ta", "b"), ("t", "ab"), ("tab", "")]
    found = {keys_of(tokens, tenant, adapter)[0] for tenant, adapter in owners}
    assert len(found) == len(owners)
