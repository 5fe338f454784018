"""How benches are run: what they began ends with them."""

import os
import subprocess
import sys
from pathlib import Path

BENCH = """
import tempfile, time
from bench.measuring.entry import run_bench

def main():
    with tempfile.TemporaryDirectory():
        print("here", flush=True)
        time.sleep(60)

run_bench(main)
"""


def test_a_bench_that_is_ended_takes_its_scratch_directory_along(tmp_path: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-c", BENCH], env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "here\n"
        assert len(list(tmp_path.iterdir())) == 1
        process.terminate()
        assert process.wait(30) != 0
    assert list(tmp_path.iterdir()) == []
