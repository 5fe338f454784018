"""`gearfall demo migrate` from start to end, as a user runs it."""

import json
import subprocess
import sys
from pathlib import Path

from gearfall.demo.migrate import MOVES_AT, TOKENS


def test_the_moved_answer_is_the_undisturbed_one():
    command = [sys.executable, "-m", "gearfall.cli", "demo", "migrate", "--pace", "300", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["tokens"], found["same_tokens"], found["is_same"]) == (TOKENS, TOKENS, True)
    assert len(found["moves"]) == len(MOVES_AT)
    workers = {move["source"] for move in found["moves"]}
    assert len(workers) == 2
    for before, after in zip(found["moves"], found["moves"][1:], strict=False):
        assert after["source"] == before["target"] != before["source"]
        assert after["after_tokens"] > before["after_tokens"]
    assert found["text"].startswith("777777")


def test_ended_from_outside_it_leaves_nothing_behind(scratch: Path):
    with subprocess.Popen(
        [sys.executable, "-u", "-m", "gearfall.cli", "demo", "migrate", "--pace", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        said = ""
        while "goes on from" not in said:
            line = process.stdout.readline()
            assert line, said
            said += line
        assert len(list(scratch.glob("gearfall-demo-*"))) == 1
        process.terminate()
        rest = process.stdout.read()
        assert process.wait(60) != 0, rest
    assert list(scratch.glob("gearfall-demo-*")) == [], rest
