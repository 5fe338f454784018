"""What the demo says of a comparison."""

from dataclasses import replace

import pytest

from gearfall.demo.measure import DemoReport, Planned, SystemReport, print_report


def system(name: str, accuracy: float, cost: float) -> SystemReport:
    return SystemReport(name, 500, accuracy, cost, 0.01, 0.02, 0.3, {"large": 1.0})


REPORT = DemoReport(
    (system("large", 0.98, 3e6), system("arith", 0.965, 1e6)),
    concurrency=4,
    loss=0.015,
    cost_ratio=3.0,
    planned=Planned(loss=0.02, cost_ratio=2.9),
)


@pytest.mark.parametrize(
    ("change", "is_kept"),
    [({}, True), ({"loss": -0.01}, True), ({"loss": 0.021}, False), ({"cost_ratio": 0.9}, False)],
)
def test_a_plan_is_kept_when_no_more_was_lost_and_something_was_saved(
    change: dict[str, float], is_kept: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    report = replace(REPORT, **change)  # type: ignore[arg-type]
    assert report.is_kept is is_kept
    print_report(report)
    assert ("does NOT keep" in capsys.readouterr().out) is not is_kept
