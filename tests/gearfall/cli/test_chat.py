"""What `gearfall chat` shows while an answer comes."""

import pytest

from gearfall.cli.chat import show
from gearfall.client import Finished, Replaced, TextDelta
from gearfall.core.certainty.escalation import Degraded
from gearfall.core.generation.job import FinishReason
from gearfall.core.generation.usage import Usage


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


@pytest.mark.parametrize("text", ["word " * 500, ":warning: [bold]not[/bold] [/x]", "a\n\n  b"])
def test_an_answer_is_shown_as_it_is(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    show(TextDelta(0, text))
    assert capsys.readouterr().out == text


@pytest.mark.parametrize(
    ("degraded", "device_s", "says"),
    [
        (None, 0.0, "2.0 MFLOP"),
        (None, 0.0125, "2.0 MFLOP, 12.5 ms of the device"),
        (Degraded.LOADING, 0.0, "2.0 MFLOP; degraded: loading"),
    ],
)
def test_the_last_line_says_what_an_answer_took_and_lacks(
    degraded: Degraded | None, device_s: float, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = Usage(3, 2, 3, 2, 2e6, device_s=device_s)
    show(Finished(0, FinishReason.STOP, "small", (), usage, degraded))
    assert capsys.readouterr().out.strip().endswith(says)
