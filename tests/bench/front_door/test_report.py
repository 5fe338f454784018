"""The table and the JSON document of the front-door bench."""

import io
import json

import pytest
from rich.console import Console

from bench.front_door.figures import Cell, LoadFigures, Run
from bench.front_door.report import Report, build_report, print_report, report_to_json

ONE_USER = Cell(is_stream=False, users=1)


def make_report(
    *, with_peer: bool = True, failures: int = 0, restarts: int = 0, cpu: bool = True
) -> Report:
    rates = {"direct": 4000, "litellm": 250, "gearfall": 1000}
    runs = [
        Run(
            round_index=0,
            target=target,
            cell=ONE_USER,
            load=LoadFigures(rate, failures, 1.0, 1000 / rate, 20.0, 30.0, 40.0),
            cpu_ms_per_request={"main": 0.5, "aside": 0.25} if cpu else {},
        )
        for target, rate in rates.items()
        if with_peer or target != "litellm"
    ]
    return build_report(
        runs,
        settings={"rounds": 1},
        machine={"cores": 4},
        versions={"peers": {"k6": "1.1.0"}},
        peer_missing="" if with_peer else "litellm[proxy]: no such thing",
        restarts=restarts,
        ours="gearfall",
        peer="litellm",
    )


def printed(report: Report) -> str:
    output = io.StringIO()
    print_report(report, Console(file=output, width=80))
    return output.getvalue()


def rows_of(text: str, target: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines() if target in line.split()]


def test_the_table_says_rate_latency_cpu_and_failures() -> None:
    load_row, added_row = rows_of(printed(make_report()), "gearfall")[:2]
    assert load_row == ["whole,", "1", "user", "gearfall", "1000", "1", "20", "30", "0.75", "0"]
    assert added_row == ["whole,", "1", "user", "gearfall", "0.75", "(0.75", "to", "0.75)"]


def test_the_ratio_is_printed() -> None:
    _, _, ratios = printed(make_report()).partition("gearfall / litellm, compared round by round")
    (row,) = [line.split() for line in ratios.splitlines() if "1 user" in line]
    assert row[3:] == ["4", "(4", "to", "4)", "0.25", "(0.25", "to", "0.25)"]


def test_a_missing_peer_is_said_and_has_no_ratio() -> None:
    text = printed(make_report(with_peer=False))
    assert "No peer in this run: litellm[proxy]: no such thing" in text
    assert "gearfall / litellm" not in text


@pytest.mark.parametrize(("failures", "restarts", "total"), [(2, 0, 6), (0, 1, 1)])
def test_failures_are_counted_and_said(failures: int, restarts: int, total: int) -> None:
    report = make_report(failures=failures, restarts=restarts)
    assert report.failures == total
    assert f"{total} failures: these figures are of no use." in printed(report)


def test_unknown_cpu_time_is_called_so() -> None:
    assert rows_of(printed(make_report(cpu=False)), "gearfall")[0][-2] == "unknown"


def test_the_document_is_json_and_holds_every_run() -> None:
    document = json.loads(json.dumps(report_to_json(make_report())))
    assert document["failures"] == 0
    assert [run["target"] for run in document["runs"]] == ["direct", "litellm", "gearfall"]
    assert document["runs"][2]["cell"] == {"is_stream": False, "users": 1}
    assert document["ratios"][0]["requests_per_s"]["median"] == 4.0
