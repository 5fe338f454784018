"""Records survive the way into cluster state and back; what is no record is refused."""

import importlib
import pkgutil
import types
import typing
from dataclasses import is_dataclass
from enum import EnumMeta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gearfall import core
from gearfall.core.errors import InvalidRequest
from gearfall.core.ids import ModelName, RouterId
from gearfall.core.records import DemandRecord, SchedulerRecord
from gearfall.infra.state.cluster_keys import (
    ALL_KINDS,
    KINDS,
    LEADER,
    LEADER_KEY,
    UndecodableError,
    decode_entry,
    encode_record,
    key_of,
    key_of_record,
)

IDS = st.text(min_size=1, max_size=20).filter(lambda text: not set("/\0") & set(text))
PLAIN: dict[Any, st.SearchStrategy[Any]] = {
    bool: st.booleans(),
    int: st.integers(-(2**63), 2**63 - 1),
    float: st.floats(allow_nan=False, allow_infinity=False),
    str: st.text(max_size=20),
    type(None): st.none(),
}


def strategy(hint: Any) -> st.SearchStrategy[Any]:
    """Values of a type hint as records use them; floats are finite."""
    if isinstance(hint, typing.NewType):
        return strategy(hint.__supertype__)
    if isinstance(hint, EnumMeta):
        return st.sampled_from(list[Any](hint))
    if isinstance(hint, type) and is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        return st.builds(hint, **{name: strategy(part) for name, part in hints.items()})
    arguments = [strategy(part) for part in typing.get_args(hint) if part is not ...]
    if isinstance(hint, types.UnionType):
        return st.one_of(arguments)
    match typing.get_origin(hint):
        case builtin if builtin is dict:
            return st.dictionaries(*arguments, max_size=3)
        case builtin if builtin is tuple and ... in typing.get_args(hint):
            return st.lists(arguments[0], max_size=3).map(tuple)
        case builtin if builtin is tuple:
            return st.tuples(*arguments)
    return PLAIN[hint]


def records_of(kind: str) -> st.SearchStrategy[Any]:
    record_type = KINDS[kind].record_type
    fields = {name: strategy(part) for name, part in typing.get_type_hints(record_type).items()}
    return st.builds(record_type, **fields | dict.fromkeys(KINDS[kind].id_fields, IDS))


@pytest.mark.parametrize("kind", sorted(KINDS))
@given(data=st.data())
def test_every_record_survives_the_way_there_and_back(kind, data):
    record = data.draw(records_of(kind))
    key = key_of_record(kind, record)
    ids = tuple(getattr(record, field) for field in KINDS[kind].id_fields)
    assert key.split("/") == [kind, *ids]
    expected_id = ids[0] if len(ids) == 1 else ids
    assert decode_entry(key, encode_record(record)) == (kind, expected_id, record)


def test_every_record_type_of_the_core_has_a_kind():
    modules = [
        importlib.import_module(found.name)
        for found in pkgutil.walk_packages(core.__path__, f"{core.__name__}.")
    ]
    named = {
        value
        for module in modules
        for name, value in vars(module).items()
        if name.endswith("Record")
    }
    assert {kind.record_type for kind in KINDS.values()} == named
    assert set(KINDS) | {LEADER} == ALL_KINDS


def test_the_leader_key_holds_a_scheduler():
    record = SchedulerRecord("s1", "127.0.0.1:1")
    assert decode_entry(LEADER_KEY, encode_record(record)) == (LEADER, LEADER, record)


@pytest.mark.parametrize("part", ["", "a/b", "a\0b"])
def test_an_id_that_would_break_a_key_is_refused(part):
    with pytest.raises(InvalidRequest):
        key_of("models", part)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_number_that_json_can_not_carry_is_refused(number):
    record = DemandRecord(ModelName("m"), RouterId("r"), 1, number)
    with pytest.raises(InvalidRequest):
        encode_record(record)


GOOD = encode_record(DemandRecord(ModelName("m"), RouterId("r"), 1, 2.0))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("demand/m/r", b""),
        ("demand/m/r", b"{"),
        ("demand/m/r", b"\xff\xfe"),
        ("demand/m/r", b"[1, 2]"),
        ("demand/m/r", GOOD.replace(b"1", b'"one"', 1)),
        ("demand/m/r", b"[" * 100_000),
        ("demand/m/other", GOOD),
        ("demand/m", GOOD),
        ("demand/m/r/x", GOOD),
        ("models/m", GOOD),
        ("unknown/m", GOOD),
        ("", GOOD),
    ],
)
def test_what_is_no_record_of_its_key_is_undecodable(key, value):
    with pytest.raises(UndecodableError):
        decode_entry(key, value)


@given(key=st.sampled_from(["models/m", "leader", "replicas/w/m"]), value=st.binary(max_size=60))
def test_no_bytes_do_worse_than_being_undecodable(key, value):
    with pytest.raises(UndecodableError):
        decode_entry(key, value)


def test_a_field_from_a_later_version_is_ignored():
    value = GOOD.replace(b"{", b'{"later":[1],', 1)
    assert decode_entry("demand/m/r", value)[1] == ("m", "r")
