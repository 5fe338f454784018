"""SIGTERM as Ctrl-C: it ends a program however that was started."""

import subprocess
import sys

import pytest

PROGRAM = """
import asyncio
from gearfall.infra.local.ctrl_c import take_sigterm_as_ctrl_c

async def wait():
    print("here", flush=True)
    await asyncio.sleep(60)

take_sigterm_as_ctrl_c()
try:
    asyncio.run(wait())
except KeyboardInterrupt:
    print("ended in order")
"""


@pytest.mark.parametrize("started", ["", "trap '' INT; "], ids=["asked", "in the background"])
def test_sigterm_ends_a_program_in_order(started: str) -> None:
    command = ["sh", "-c", f'{started}exec "$@"', "sh", sys.executable, "-c", PROGRAM]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "here\n"
        process.terminate()
        try:
            said, _ = process.communicate(timeout=30)
        finally:
            process.kill()
    assert said == "ended in order\n"
