"""Failpoints: what rules mean, and real processes that are killed, stopped, delayed and failed."""

import ast
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gearfall.core.errors import InvalidRequest, Unavailable
from gearfall.infra.failpoints import (
    BELL_FILE,
    DIRECTORY_VARIABLE,
    NAMES,
    REACHED_FILE,
    RULES_FILE,
    RULES_VARIABLE,
    Action,
    arm_failpoints,
    failpoint,
    failpoint_async,
    parse_rules,
)

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def disarmed():
    yield
    arm_failpoints("test", {})


def arm(rules: str = "", directory: Path | None = None) -> None:
    arm_failpoints(
        "test", {RULES_VARIABLE: rules, DIRECTORY_VARIABLE: str(directory) if directory else ""}
    )


def fails(name: str, **facts: str) -> bool:
    try:
        failpoint(name, **facts)
    except Unavailable:
        return True
    return False


def set_rules(directory: Path, rules: str) -> None:
    new = directory / "new"
    new.write_text(rules)
    new.replace(directory / RULES_FILE)


def reached(directory: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (directory / REACHED_FILE).read_text().splitlines()]


def test_a_rule_says_point_filters_action_argument_and_ordinal() -> None:
    (first, second) = parse_rules("worker.push[job=j,pid=7]=delay:0.25 ; engine.decode=kill:42@3\n")
    assert first.name == "worker.push"
    assert (first.action, first.argument, first.ordinal) == (Action.DELAY, 0.25, 0)
    assert first.filters == (("job", "j"), ("pid", "7"))
    assert (second.action, second.argument, second.ordinal) == (Action.KILL, 42, 3)


@pytest.mark.parametrize(
    "rules",
    [
        *("worker.psuh=kill", "worker.push", "worker.push=explode", "worker.push=delay"),
        *("worker.push[worker=1]=kill", "worker.push=kill@0", "worker.push=kill@x", "=kill"),
        *("worker.push[job]=kill", "worker.push=kill kill", "worker.push=stop:0"),
        *("worker.push=kill:1.5", "worker.push=delay:"),
    ],
)
def test_a_rule_that_could_never_fire_is_refused(rules: str) -> None:
    with pytest.raises(InvalidRequest):
        parse_rules(rules)


def test_nothing_happens_unless_armed() -> None:
    assert not any(fails(name) for name in NAMES)


def test_filters_let_pass_what_they_do_not_name() -> None:
    arm(f"worker.push[job=j,model=m,service=test,pid={os.getpid()}]=fail")
    assert fails("worker.push", job_id="j", model="m")
    assert not fails("worker.push", job_id="other", model="m")
    assert not fails("worker.push", job_id="j")
    assert not fails("worker.claim", job_id="j", model="m")


def test_an_ordinal_counts_only_what_the_filters_let_through() -> None:
    arm("worker.push[job=j]=fail@2")
    passes = [fails("worker.push", job_id=job) for job in ("j", "x", "j", "j")]
    assert passes == [False, False, True, False]


def test_the_file_is_read_again_when_it_changes(tmp_path: Path) -> None:
    arm(directory=tmp_path)
    assert not fails("worker.push")
    set_rules(tmp_path, "worker.push=fail")
    assert fails("worker.push")
    set_rules(tmp_path, "worker.claim=fail")
    assert not fails("worker.push")
    (tmp_path / RULES_FILE).unlink()
    assert not fails("worker.claim")


def test_a_rule_with_an_ordinal_fires_in_one_process_only(tmp_path: Path) -> None:
    set_rules(tmp_path, "worker.push=fail@1")
    arm(directory=tmp_path)
    assert fails("worker.push")
    arm(directory=tmp_path)  # as in another process: nothing was passed there yet
    assert not fails("worker.push")
    set_rules(tmp_path, "worker.push=fail@1")
    assert fails("worker.push")


async def test_a_delay_lets_the_event_loop_go_on() -> None:
    arm("worker.push=delay:0.05")
    started_s = time.monotonic()
    await failpoint_async("worker.push")
    failpoint("worker.push")
    assert time.monotonic() - started_s >= 0.1
    arm("worker.push=fail")
    with pytest.raises(Unavailable) as caught:
        await failpoint_async("worker.push")
    assert caught.value.code == "failpoint"


PASS = """
import os
from gearfall.infra.failpoints import arm_failpoints, failpoint
arm_failpoints("passer", os.environ)
failpoint("worker.push", job_id="j")
print("passed", flush=True)
"""


def start_passer(directory: Path, rules: str) -> "subprocess.Popen[str]":
    set_rules(directory, rules)
    return subprocess.Popen(
        [sys.executable, "-c", PASS],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, DIRECTORY_VARIABLE: str(directory)},
    )


def test_kill_is_announced_and_then_happens(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / BELL_FILE)
    bell = os.open(tmp_path / BELL_FILE, os.O_RDWR | os.O_NONBLOCK)
    with start_passer(tmp_path, "worker.push=kill@1") as passer:
        assert passer.wait(30) == -signal.SIGKILL
        assert passer.stdout is not None
        assert passer.stdout.read() == ""
    assert os.read(bell, 9) == b"\n"
    os.close(bell)
    (line,) = reached(tmp_path)
    assert (line["point"], line["action"], line["job"]) == ("worker.push", "kill", "j")
    assert (line["service"], line["pid"]) == ("passer", str(passer.pid))


def test_stop_freezes_until_it_is_continued(tmp_path: Path) -> None:
    with start_passer(tmp_path, "worker.push=stop") as passer:
        _, status = os.waitpid(passer.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        passer.send_signal(signal.SIGCONT)
        assert passer.stdout is not None
        assert passer.stdout.read() == "passed\n"
        assert passer.wait(30) == 0


def test_another_process_can_be_struck(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "60"]) as victim:
        set_rules(tmp_path, f"worker.push=kill:{victim.pid}@1")
        arm(directory=tmp_path)
        failpoint("worker.push")
        assert victim.wait(30) == -signal.SIGKILL


def names_in_code() -> list[str]:
    names = []
    for folder in ("services", "gearfall"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                is_call = isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
                if is_call and node.func.id in {"failpoint", "failpoint_async"}:  # type: ignore[attr-defined]
                    (argument,) = node.args  # type: ignore[attr-defined]
                    names += names_of(argument)
    return names


def names_of(argument: ast.expr) -> list[str]:
    """The name itself, or all that a name with a part put in may become."""
    if isinstance(argument, ast.Constant):
        return [str(argument.value)]
    assert isinstance(argument, ast.JoinedStr), ast.dump(argument)
    parts = [
        re.escape(str(each.value)) if isinstance(each, ast.Constant) else "[a-z]+"
        for each in argument.values
    ]
    found = [name for name in NAMES if re.fullmatch("".join(parts), name)]
    assert found, ast.dump(argument)
    return found


def test_every_documented_name_is_in_the_code_and_none_else() -> None:
    text = (ROOT / "docs" / "reliability.md").read_text()
    table = text.split("## Failpoints")[1].split("##")[0]
    cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    documented = {name for cell in cells for name in cell.split("`")[1::2]}
    assert documented == set(names_in_code()) == NAMES
