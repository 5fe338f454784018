"""`gearfall history` as a user calls it."""

import json
from pathlib import Path

from typer.testing import CliRunner, Result

from gearfall.cli.main import app
from gearfall.core.errors import NotFound
from gearfall.core.generation.history import Accepted, Appended, Bound, Ended, Event
from gearfall.core.ids import Epoch, JobId, ModelName, WorkerId
from gearfall.infra.history_log import HistoryLog

JOB, WORKER = JobId("j"), WorkerId("w")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["history", *map(str, arguments)])


def write(directory: Path, *events: Event) -> None:
    log = HistoryLog(directory, "router")
    for event in events:
        log.write(event)
    log.close()


def answer(index: int) -> tuple[Event, ...]:
    return (
        Accepted(JOB, ModelName("m"), "d"),
        Bound(JOB, Epoch(1), WORKER),
        Appended(JOB, Epoch(1), WORKER, index, (5, 6)),
        Ended(JOB, "length"),
    )


def test_an_empty_directory_is_an_error(tmp_path: Path) -> None:
    assert isinstance(run(tmp_path).exception, NotFound)


def test_the_verdict_and_its_counts_are_printed(tmp_path: Path) -> None:
    write(tmp_path, *answer(index=0))
    result = run(tmp_path, "--running", "--json")
    # The history is this very process's: it ended in order and yet runs.
    assert result.exit_code == 0, result.output
    said = json.loads(result.output)
    assert (said["sound"], said["tokens"], said["jobs"], said["processes"]) == (True, 2, 1, 1)


def test_a_breach_exits_with_1_and_is_named(tmp_path: Path) -> None:
    write(tmp_path, *answer(index=1))
    result = run(tmp_path)
    assert result.exit_code == 1
    assert "lost 1, repeated 0, changed 0" in result.output
    assert "breach router" in result.output
