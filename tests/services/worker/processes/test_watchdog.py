"""A frozen engine is killed; one that computes, waits or has nothing to do is left alone."""

import os
import signal
import subprocess
import time

import pytest

from services.worker.engine_link.messages import ProbeEngine
from services.worker.processes.watchdog import (
    KILL_AFTER_LOOKS,
    PROBE_AFTER_LOOKS,
    Watchdog,
    processor_ticks,
    watching,
)

ENOUGH_LOOKS = 3 * (PROBE_AFTER_LOOKS + KILL_AFTER_LOOKS)


class Engine:
    pid = 7

    def __init__(self):
        self.probes = 0
        self.kills = 0

    def send(self, message):
        assert message == ProbeEngine()
        self.probes += 1

    def kill(self):
        self.kills += 1


class Watched:
    """A watchdog with an engine that uses processor time as `ticks` say."""

    def __init__(self, ticks=lambda _look: 5, has_work=True):
        self.engine = Engine()
        self.has_work = has_work
        self.looks = 0
        self.dog = Watchdog(
            self.engine,  # type: ignore[arg-type]
            lambda: self.has_work,
            ticks_of=lambda _pid: ticks(self.looks),
        )

    def look(self, times=1):
        for _ in range(times):
            self.looks += 1
            self.dog.look()


def test_a_silent_engine_is_asked_once_and_then_killed() -> None:
    watched = Watched()
    watched.look(PROBE_AFTER_LOOKS - 1)
    assert watched.engine.probes == 0
    watched.look(KILL_AFTER_LOOKS)
    assert (watched.engine.probes, watched.engine.kills) == (1, 0)
    watched.look()
    assert (watched.engine.probes, watched.engine.kills) == (1, 1)


@pytest.mark.parametrize(
    "watched",
    [Watched(has_work=False), Watched(ticks=lambda look: look), Watched(ticks=lambda _: None)],
    ids=["idle", "computes", "gone"],
)
def test_an_engine_that_is_not_frozen_is_left_alone(watched: Watched) -> None:
    watched.look(ENOUGH_LOOKS)
    assert watched.engine.kills == 0


def test_an_answer_begins_the_count_again() -> None:
    watched = Watched()
    for _ in range(3):
        watched.look(PROBE_AFTER_LOOKS + KILL_AFTER_LOOKS - 1)
        watched.dog.heard()
    assert (watched.engine.probes, watched.engine.kills) == (3, 0)


def test_an_engine_that_computed_and_then_froze_is_killed() -> None:
    watched = Watched(ticks=lambda look: min(look, ENOUGH_LOOKS))
    watched.look(ENOUGH_LOOKS)
    assert watched.engine.kills == 0
    watched.look(KILL_AFTER_LOOKS)
    assert watched.engine.kills == 1


def test_ticks_are_those_of_the_process() -> None:
    with subprocess.Popen(["sleep", "60"]) as still:
        try:
            still.send_signal(signal.SIGSTOP)
            os.waitpid(still.pid, os.WUNTRACED)
            before = processor_ticks(still.pid)
            own = processor_ticks(os.getpid())
            assert own is not None
            end_s = time.process_time() + 0.05
            while time.process_time() < end_s:
                pass
            assert processor_ticks(still.pid) == before is not None
            now = processor_ticks(os.getpid())
            assert now is not None
            assert now > own
        finally:
            still.kill()
    assert processor_ticks(still.pid) is None


def test_ticks_are_those_of_the_group_that_a_process_leads() -> None:
    computes_below = ("sh", "-c", "while :; do :; done & wait")
    with subprocess.Popen(computes_below, process_group=0) as leader:
        try:
            own_s, before = time.process_time(), processor_ticks(leader.pid)
            assert before is not None
            while (processor_ticks(leader.pid) or 0) < before + 5:
                assert time.process_time() < own_s + 10, "what it started computes"
        finally:
            os.killpg(leader.pid, signal.SIGKILL)


async def test_the_watch_ends_with_its_block() -> None:
    async with watching(Engine(), lambda: True) as dog:  # type: ignore[arg-type]
        dog.heard()
