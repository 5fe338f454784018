"""Old and new services side by side in one cluster: each reads what the other one writes."""

import dataclasses
import typing

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gearfall.infra.state.cluster_keys import KINDS, decode_entry, encode_record, key_of_record
from tests.gearfall.infra.state.test_cluster_keys import records_of

REQUIRED = {
    "models": "name digest architecture parameters size_bytes context_tokens vocabulary_size "
    "bos_token_id eos_token_ids source nodes dtype",
    "deployments": "name stages",
    "nodes": "node_id address attach_socket dram_capacity_bytes dram_used_bytes ssd_bytes_per_s",
    "workers": "worker_id node_id address device memory_bytes max_replicas",
    "routers": "router_id grpc_address rest_address",
    "schedulers": "scheduler_id address",
    "assignments": "worker_id model memory_bytes reason assigned_unix_s",
    "replicas": "worker_id node_id model state slots running_jobs pid memory_bytes "
    "idle_since_unix_s",
    "demand": "model router_id waiting_jobs since_unix_s",
    "load": "model router_id at_unix_s arrived_jobs arrived_prompt_tokens produced_tokens "
    "unfinished_jobs",
    "moves": "worker_id model target for_model reason began_unix_s",
    "prefetch": "node_id model tier reason wished_unix_s",
    "learned": "subject at_unix_s content",
    "gear_plans": "name version content",
    "gear_votes": "name router_id version gear tokens_per_s queued_tokens",
    "drift": "name cascade version thresholds",
    "decisions": "model at_unix_s decision reason",
}
"""Fields that every version writes and that none reads a record without. They grow no more: a
version before would not write a new one. One that goes is missed by the version before."""


def without_default(record_type: type) -> set[str]:
    """Names of the fields that a record can't be read without."""
    missing = dataclasses.MISSING
    return {
        field.name
        for field in dataclasses.fields(record_type)
        if field.default is missing and field.default_factory is missing
    }


def test_a_new_field_has_a_default_and_an_old_one_stays():
    found = {name: without_default(kind.record_type) for name, kind in KINDS.items()}
    assert found == {name: set(fields.split()) for name, fields in REQUIRED.items()}


@pytest.mark.parametrize("kind", sorted(KINDS))
@settings(max_examples=10)
@given(data=st.data())
def test_a_record_of_a_version_that_knew_less_is_read(kind, data):
    record = data.draw(records_of(kind))
    old = {name: getattr(record, name) for name in REQUIRED[kind].split()}
    value = msgspec.json.encode(old)
    assert decode_entry(key_of_record(kind, record), value)[2] == type(record)(**old)


@pytest.mark.parametrize("kind", sorted(KINDS))
@settings(max_examples=10)
@given(data=st.data())
def test_a_record_of_a_version_that_knows_more_is_read(kind, data):
    record = data.draw(records_of(kind))
    value = widened(msgspec.json.decode(encode_record(record)), KINDS[kind].record_type)
    assert decode_entry(key_of_record(kind, record), msgspec.json.encode(value))[2] == record


def widened(value: typing.Any, hint: typing.Any) -> typing.Any:
    """Return JSON with a field of tomorrow in every object that is a dataclass."""
    if dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        return {name: widened(part, hints[name]) for name, part in value.items()} | {
            "of_tomorrow": {"any": [1, None]}
        }
    if isinstance(value, list):
        inner = [each for each in typing.get_args(hint) if each is not ...]
        hints_of = inner if len(inner) == len(value) else inner[:1] * len(value)
        return [widened(part, of) for part, of in zip(value, hints_of, strict=True)]
    return value
