"""CPU time of processes and their children."""

import os
import subprocess
import sys

import pytest

from bench.measuring.cpu_time import cpu_seconds, parse_stat

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")

BURN = "import time\nwhile time.process_time() < 0.05: pass\nprint(1, flush=True); input()"
PARENT = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {BURN!r}])"
ENDS = BURN.removesuffix("; input()")
AFTER = (
    f"import subprocess, sys; subprocess.run([sys.executable, '-c', {ENDS!r}], stdout=-3); "
    "print(1, flush=True); input()"
)


@pytest.mark.parametrize("name", ["router", "my (odd) name", ") 1 2 ("])
def test_the_name_of_a_process_does_not_mislead(name: str) -> None:
    before_times = "S 1 1 1 0 -1 4194560 100 0 0 0"
    text = f"42 ({name}) {before_times} 300 200 7 7 20 0 1 0 12345\n"
    assert parse_stat(text) == pytest.approx(500 / TICKS_PER_S)
    assert parse_stat(text, with_ended=True) == pytest.approx(514 / TICKS_PER_S)


@linux_only
@pytest.mark.parametrize(
    "program", [BURN, PARENT, AFTER], ids=["itself", "a child", "a child that has ended"]
)
def test_the_time_of_a_process_and_its_children_counts(program: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.readline()
    spent = cpu_seconds({"burner": process.pid})
    process.communicate(b"\n")
    assert spent["burner"] >= 0.04


@linux_only
def test_a_process_that_is_gone_counts_nothing() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    assert cpu_seconds({"gone": process.pid}) == {"gone": 0.0}
