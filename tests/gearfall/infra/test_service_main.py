"""What every service's main shares: the ready line, and its end by a signal."""

import gc
import json
import os
import signal
import subprocess
import sys

import pytest

from gearfall.infra.service_main import announce_ready

STARTS = "print('starting', flush=True); await asyncio.Event().wait()"
SERVES = "waits = asyncio.create_task(stop.wait()); await asyncio.sleep(0)"
PROGRAM = """
import asyncio
from gearfall.infra.service_main import run_service
async def main(stop):
    try:
        {start}
        print('serving', flush=True)
        await waits
        print('told', flush=True)
    finally:
        print('ended', flush=True)
run_service('test', 'INFO', main)
"""


def test_what_stands_when_a_service_is_ready_is_collected_no_more(capsys):
    try:
        announce_ready("store", "127.0.0.1:1", metrics="")
        assert gc.get_freeze_count() > 1000
        assert len(gc.get_objects()) < 1000
    finally:
        gc.unfreeze()
    line = json.loads(capsys.readouterr().out)
    expected = {"ready": True, "service": "store", "address": "127.0.0.1:1", "metrics": ""}
    assert line == {**expected, "pid": os.getpid()}


def test_a_cancellation_that_no_signal_asked_for_is_a_failure():
    argv = [sys.executable, "-c", PROGRAM.format(start="raise asyncio.CancelledError")]
    ended = subprocess.run(argv, capture_output=True, text=True, timeout=30, check=False)
    assert (ended.stdout.split(), ended.returncode) == (["ended"], 1)
    assert "service failed" in ended.stderr
    assert "CancelledError" in ended.stderr


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
    ("start", "said"),
    [(STARTS, ["starting", "ended"]), (SERVES, ["serving", "told", "ended"])],
    ids=["starting", "serving"],
)
def test_a_signal_ends_a_service_in_order_also_before_it_serves(start, said, signum):
    argv = [sys.executable, "-c", PROGRAM.format(start=start)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        first = process.stdout.readline().strip()
        process.send_signal(signum)
        rest, _ = process.communicate(timeout=30)
    assert ([first, *rest.split()], process.returncode) == (said, 0)
