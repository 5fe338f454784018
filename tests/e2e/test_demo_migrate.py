"""`gearfall demo migrate` from start to end, as a user runs it."""

import json
import subprocess
import sys

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
