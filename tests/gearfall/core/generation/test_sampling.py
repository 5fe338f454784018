"""The limits of sampling parameters and names."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gearfall.core.errors import InvalidRequest
from gearfall.core.generation.sampling import SamplingParams
from gearfall.core.ids import parse_name


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", -5),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", float("nan")),
        ("top_k", -1),
        ("seed", -1),
        ("seed", 2**64),
        ("top_logprobs", 21),
        ("top_logprobs", -1),
        ("stop_token_ids", tuple(range(65))),
    ],
)
def test_a_value_out_of_its_limits_names_its_field(field: str, value: object) -> None:
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(**({"max_tokens": 4} | {field: value}))  # type: ignore[arg-type]
    assert caught.value.param == field


@pytest.mark.parametrize(
    "name", ["../x", "a/b", "", "A", "a..b", ".a", "a.", "a\0b", "a" * 97, "-a", "ä", "a\n"]
)
def test_a_name_that_could_leave_its_folder_is_refused(name: str) -> None:
    with pytest.raises(InvalidRequest):
        parse_name(name, param="name")


@given(st.text(max_size=120))
def test_an_accepted_name_is_safe_as_a_file_name(text: str) -> None:
    try:
        name = parse_name(text, param="name")
    except InvalidRequest:
        return
    assert name == text
    assert 1 <= len(name) <= 96
    assert not set(name) - set("abcdefghijklmnopqrstuvwxyz0123456789._-")
    assert ".." not in name
    assert name[0] not in ".-_"
