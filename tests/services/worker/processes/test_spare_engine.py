"""The process that a zygote forks ahead of need: used when it is there, never missed when not."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from services.worker.processes.zygote_client import ExitStatus, Zygote
from tests.services.worker.processes.test_zygote import start_engine
from tests.services.worker.spare_parent import SCENARIOS
from tests.services.worker.tiny_checkpoints import random_model, tiny_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    with tiny_checkpoint(random_model("llama"), tmp_path_factory.mktemp("llama")) as checkpoint:
        yield checkpoint


@pytest.mark.parametrize("scenario", sorted(SCENARIOS))
def test_a_spare_is_handed_over_let_go_or_found_dead(scenario):
    command = [sys.executable, "-m", "tests.services.worker.spare_parent", scenario]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 0, done.stderr


def children_of(pid: int) -> set[int]:
    return {int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}


def threads_of(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/task").iterdir()))


async def spare_of(zygote_pid: int, known: frozenset[int]) -> int:
    """Return the zygote's child that is not `known`, once there is one."""
    deadline_s = time.monotonic() + 20
    while time.monotonic() < deadline_s:
        found = children_of(zygote_pid) - known
        if found:
            return found.pop()
        await asyncio.sleep(0.002)
    raise AssertionError("no spare was forked")


async def test_engines_come_from_spares_and_a_killed_one_is_replaced_by_a_fork(checkpoint):
    zygote = Zygote()
    await zygote.start()
    try:
        assert zygote.pid is not None
        first_spare = await spare_of(zygote.pid, frozenset())
        first = await start_engine(zygote, checkpoint)
        assert first.pid == first_spare
        # Neither the rehearsal nor a start with one thread leaves another one running.
        assert threads_of(first.pid) == 1
        second_spare = await spare_of(zygote.pid, frozenset({first.pid}))
        os.kill(second_spare, signal.SIGKILL)
        second = await start_engine(zygote, checkpoint)
        assert second.pid not in {first.pid, second_spare}
        assert zygote.pid is not None  # a spare's end is nobody's engine's end
        third_spare = await spare_of(zygote.pid, frozenset({first.pid, second.pid, second_spare}))
        for engine in (first, second):
            engine.kill()
            assert await engine.wait_exit() == ExitStatus(exit_code=0, signal=signal.SIGKILL)
        third = await start_engine(zygote, checkpoint)
        assert third.pid == third_spare
    finally:
        await zygote.stop()
    zygote.check()
