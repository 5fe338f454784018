from dataclasses import replace

import pytest

from gearfall.core.ids import ModelName
from gearfall.core.memory import (
    MAX_KV_TOKENS,
    PROCESS_OVERHEAD_BYTES,
    estimate_replica_memory,
    kv_capacity_tokens,
)
from gearfall.core.records import ModelRecord

MODEL = ModelRecord(
    name=ModelName("small"),
    digest="d",
    architecture="LlamaForCausalLM",
    parameters=10,
    size_bytes=1000,
    context_tokens=128,
    vocabulary_size=17,
    bos_token_id=None,
    eos_token_ids=(2,),
    source="/m",
    nodes=(),
    dtype="bfloat16",
    kv_bytes_per_token=3,
)


@pytest.mark.parametrize(
    ("context_tokens", "slots", "expected"),
    [
        (128, 1, 128),
        (128, 16, 2048),
        (8192, 16, MAX_KV_TOKENS),
        (131_072, 16, 131_072),
    ],
)
def test_every_slot_holds_a_context_up_to_the_cap_and_one_always_does(
    context_tokens, slots, expected
):
    assert kv_capacity_tokens(replace(MODEL, context_tokens=context_tokens), slots) == expected


def test_a_replica_reserves_weights_cache_and_process():
    memory = estimate_replica_memory(MODEL, 2)
    assert (memory.weights_bytes, memory.kv_bytes) == (1000, 2 * 128 * 3)
    assert memory.total_bytes == 1000 + 768 + PROCESS_OVERHEAD_BYTES
