"""What `gearfall chat` shows while an answer comes."""

import pytest

from gearfall.cli.chat import show
from gearfall.client import Replaced, TextDelta


def test_a_replaced_draft_is_said_to_be_void(capsys: pytest.CaptureFixture[str]) -> None:
    for event in (
        TextDelta(0, "wrong"),
        Replaced(0, "small", "large", 5, 0),
        TextDelta(0, "right"),
    ):
        show(event)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "wrong"
    assert "large instead of that" in lines[1]
    assert lines[-1] == "right"
