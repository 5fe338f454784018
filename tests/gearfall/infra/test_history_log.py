"""Histories of real processes: what was written outlives kill -9, and they say what they hold."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from gearfall.core.errors import DeadlineExceeded, InvalidRequest
from gearfall.core.generation.history import Claimed, Holding, ProcessEnded, ProcessStarted, Settled
from gearfall.core.ids import Epoch, JobId
from gearfall.infra.history_log import (
    HISTORY_VARIABLE,
    alive_pids,
    ask_what_is_held,
    close_history,
    count_held,
    open_history,
    read_histories,
    record,
    start_ticks,
)

ROOT = Path(__file__).parents[3]
WRITER = """
import os, signal, sys
from gearfall.core.generation.history import Claimed
from gearfall.infra.history_log import close_history, count_held, open_history, record
open_history("writer", os.environ)
count_held("claims", lambda: 3)
for epoch in range(100):
    record(Claimed, "job", epoch)
print("written", flush=True)
sys.stdin.read()
close_history()
"""


@contextmanager
def writer(directory: Path) -> Iterator["subprocess.Popen[str]"]:
    """A process that wrote a hundred events and ends in order when its input does."""
    with subprocess.Popen(
        [sys.executable, "-c", WRITER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, HISTORY_VARIABLE: str(directory)},
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "written\n"
        try:
            yield process
        finally:
            process.kill()


def test_nothing_is_written_or_made_unless_asked_for(tmp_path: Path) -> None:
    def explode() -> Holding:
        raise AssertionError("made though nobody asked")

    open_history("test", {})
    record(explode)
    close_history()
    assert list(tmp_path.iterdir()) == []


def test_events_come_back_in_order_and_the_end_says_what_is_held(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGUSR1)
    open_history("test", {HISTORY_VARIABLE: str(tmp_path)})
    signal.signal(signal.SIGUSR1, before)
    count_held("slots", lambda: 2)
    record(Claimed, JobId("a"), Epoch(1))
    record(Settled, JobId("a"), Epoch(1))
    close_history()
    close_history()
    record(Claimed, JobId("late"), Epoch(1))
    (history,) = read_histories(tmp_path)
    assert (history.start.service, history.start.pid) == ("test", os.getpid())
    assert history.events == (
        Claimed(JobId("a"), Epoch(1)),
        Settled(JobId("a"), Epoch(1)),
        Holding({"slots": 2}),
        ProcessEnded(),
    )
    assert history.has_ended
    assert alive_pids([history]) == {os.getpid()}


def test_kill_9_loses_nothing_that_was_written(tmp_path: Path) -> None:
    with writer(tmp_path) as process:
        (history,) = read_histories(tmp_path)
        assert alive_pids([history]) == {process.pid}
        process.kill()
        process.wait(30)
    (history,) = read_histories(tmp_path)
    assert [event.epoch for event in history.events if isinstance(event, Claimed)] == [*range(100)]
    assert not history.has_ended
    assert alive_pids([history]) == set()


def test_a_running_process_says_what_it_holds_when_asked(tmp_path: Path) -> None:
    with writer(tmp_path) as process:
        ask_what_is_held(tmp_path, timeout_s=30)
        (history,) = read_histories(tmp_path)
        assert history.events[-1] == Holding({"claims": 3})
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(30) == 0
    (history,) = read_histories(tmp_path)
    assert history.has_ended


def test_a_process_that_does_not_listen_is_not_asked(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "60"]) as deaf:
        try:
            start = ProcessStarted("deaf", deaf.pid, 1, start_ticks(deaf.pid))
            (tmp_path / "deaf.jsonl").write_bytes(msgspec.json.encode(start) + b"\n")
            ask_what_is_held(tmp_path, timeout_s=30)
            assert alive_pids(read_histories(tmp_path)) == {deaf.pid}
            assert deaf.poll() is None
        finally:
            deaf.kill()


def test_a_frozen_process_is_named(tmp_path: Path) -> None:
    with writer(tmp_path) as process:
        process.send_signal(signal.SIGSTOP)
        with pytest.raises(DeadlineExceeded, match=f"writer {process.pid}"):
            ask_what_is_held(tmp_path, timeout_s=0.1)
        process.send_signal(signal.SIGCONT)


def test_a_cut_last_line_is_left_out_and_another_is_refused(tmp_path: Path) -> None:
    with writer(tmp_path) as process:
        process.kill()
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    (history,) = read_histories(tmp_path)
    assert len(history.events) == 99
    path.write_bytes(whole[:-5] + b"\n" + whole)
    with pytest.raises(InvalidRequest):
        read_histories(tmp_path)
