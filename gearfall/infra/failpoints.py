"""Named points at which a test can kill, stop, delay or fail a process. Off unless armed.

A rule says what happens at a point; rules are parted by `;` or by lines:

    source.freeze=kill@2                     the second time this process passes: SIGKILL to itself
    worker.push[pid=12,model=m]=stop         whenever process 12 passes with model m: SIGSTOP
    source.commit=kill:345@1                 SIGKILL to process 345, then go on
    router.commit=delay:0.5                  go on half a second later
    worker.claim[job=j]=fail                 raise Unavailable

Filters: pid, service, job, model. With an ordinal (`@n`, counted in each process over the passes
that the filters let through) a rule fires once, in whichever process comes to it first.

GEARFALL_FAILPOINTS holds rules for as long as a process lives. GEARFALL_FAILPOINT_DIR names a
directory whose file `rules` is read again whenever it has changed; there each firing is announced
before it happens: a line in `reached`, and a byte in the fifo `bell` where somebody reads it.
"""

import asyncio
import json
import os
import re
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Final

from gearfall.core.errors import InvalidRequest, Unavailable

RULES_VARIABLE = "GEARFALL_FAILPOINTS"
DIRECTORY_VARIABLE = "GEARFALL_FAILPOINT_DIR"
RULES_FILE, REACHED_FILE, BELL_FILE = "rules", "reached", "bell"

NAMES: Final = frozenset(
    {
        *("worker.claim", "worker.accept", "worker.submit", "worker.push", "worker.release"),
        *("engine.prefill", "engine.decode", "draft.verify", "draft.accept"),
        *(
            f"{side}.{step}"
            for side in ("source", "target")
            for step in ("prepare", "bulk", "delta", "freeze", "commit", "release")
        ),
        *("source.prepare", "source.bulk", "source.delta"),
        *("source.freeze", "source.commit", "source.release"),
        *("target.prepare", "target.bulk", "target.delta"),
        *("target.freeze", "target.commit", "target.release"),
        *("router.claim", "router.push", "router.commit", "router.release", "router.finish"),
        *(
            f"scheduler.{write}.{when}"
            for write in (
                *("assign", "unassign", "move", "moved", "wish", "unwish"),
                *("decide", "undecide", "learn"),
            )
            for when in ("before", "after")
        ),
    }
)
"""Every point that there is (docs/reliability.md says where each one stands)."""

_RULE = re.compile(
    r"(?P<name>[a-z.]+)(?:\[(?P<filters>[^\]]*)\])?="
    r"(?P<action>[a-z]+)(?::(?P<argument>[0-9.]+))?(?:@(?P<ordinal>[1-9][0-9]*))?"
)
_FILTERS = frozenset({"pid", "service", "job", "model"})


class Action(Enum):
    """What happens at a point."""

    KILL = "kill"
    STOP = "stop"
    DELAY = "delay"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Rule:
    """One action at one point."""

    name: str
    action: Action
    argument: float
    """Seconds of a delay; process id to kill or stop, 0 for the one that passes."""
    ordinal: int
    """Fires at this passage alone; 0 for every one."""
    filters: tuple[tuple[str, str], ...]


def parse_rules(text: str) -> tuple[Rule, ...]:
    """Return the rules in `text`; raise InvalidRequest for one that could never fire."""
    parts = (part.strip() for part in re.split(r"[;\n]", text))
    return tuple(_parse_rule(part) for part in parts if part)


def _parse_rule(text: str) -> Rule:
    match = _RULE.fullmatch(text)
    if match is None:
        raise InvalidRequest(f"{text!r} is not a failpoint rule: name[filter=x]=action:n@n")
    name, action = match["name"], match["action"]
    if name not in NAMES:
        raise InvalidRequest(f"there is no failpoint {name!r}")
    if action not in {each.value for each in Action}:
        raise InvalidRequest(f"{action!r} is not an action: use kill, stop, delay or fail")
    pairs = tuple(part.partition("=") for part in (match["filters"] or "").split(",") if part)
    if any(not separator or key not in _FILTERS for key, separator, _ in pairs):
        raise InvalidRequest(f"{match['filters']!r}: filter by {', '.join(sorted(_FILTERS))}")
    if Action(action) is Action.DELAY and match["argument"] is None:
        raise InvalidRequest(f"{text!r} does not say how many seconds")
    if Action(action) is not Action.DELAY and match["argument"] is not None:
        _check_pid(match["argument"])
    return Rule(
        name=name,
        action=Action(action),
        argument=float(match["argument"] or 0),
        ordinal=int(match["ordinal"] or 0),
        filters=tuple((key, value) for key, _, value in pairs),
    )


def _check_pid(text: str) -> None:
    if not text.isdecimal() or int(text) == 0:
        raise InvalidRequest(f"{text} is not a process id")


@dataclass(frozen=True, slots=True)
class _RuleSet:
    """Rules that hold until the file changes, under a label that all processes give them."""

    label: str
    rules: tuple[Rule, ...]


class Failpoints:
    """The rules of one process and how often it passed each."""

    def __init__(self, service: str, rules: str, directory: Path | None) -> None:
        """`rules`: those of the environment. Raises InvalidRequest for a malformed one."""
        self._service = service
        self._directory = directory
        self._fixed = _RuleSet("environment", parse_rules(rules))
        self._from_file = _RuleSet("", ())
        self._passes: dict[tuple[str, int], int] = {}

    def find(self, name: str, job_id: str, model: str) -> Rule | None:
        """Return the rule that fires now, announced; at most one."""
        self._read_file()
        facts = {
            "pid": str(os.getpid()),
            "service": self._service,
            "job": job_id,
            "model": model,
        }
        for rules in (self._from_file, self._fixed):
            for index, rule in enumerate(rules.rules):
                is_meant = rule.name == name and all(facts[k] == v for k, v in rule.filters)
                if is_meant and self._is_due(rules, index, rule):
                    self._announce(rule, facts)
                    return rule
        return None

    def _is_due(self, rules: _RuleSet, index: int, rule: Rule) -> bool:
        key = (rules.label, index)
        self._passes[key] = self._passes.get(key, 0) + 1
        if rule.ordinal == 0:
            return True
        return self._passes[key] == rule.ordinal and self._is_first(f"fired-{rules.label}-{index}")

    def _is_first(self, marker: str) -> bool:
        """Whether no other process came to this rule's ordinal before."""
        if self._directory is None:
            return True
        try:
            os.close(os.open(self._directory / marker, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            return False
        return True

    def _read_file(self) -> None:
        if self._directory is None:
            return
        path = self._directory / RULES_FILE
        try:
            found = path.stat()
            label = f"{found.st_ino}-{found.st_mtime_ns}"
            if label != self._from_file.label:
                self._from_file = _RuleSet(label, parse_rules(path.read_text()))
        except FileNotFoundError:
            self._from_file = _RuleSet("", ())

    def _announce(self, rule: Rule, facts: Mapping[str, str]) -> None:
        if self._directory is None:
            return
        line = {"point": rule.name, "action": rule.action.value, **facts, "unix_s": time.time()}
        _append(self._directory / REACHED_FILE, json.dumps(line).encode() + b"\n")
        try:
            bell = os.open(self._directory / BELL_FILE, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:  # nobody listens
            return
        os.write(bell, b"\n")
        os.close(bell)


class _Switch:
    """Whether this process has failpoints: one for the process, as they are asked for anywhere."""

    __slots__ = ("points",)

    def __init__(self) -> None:
        self.points: Failpoints | None = None


_SWITCH = _Switch()


def arm_failpoints(service: str, environment: Mapping[str, str]) -> None:
    """Arm this process as `environment` says, or disarm it. Raises InvalidRequest for bad rules."""
    rules, directory = environment.get(RULES_VARIABLE, ""), environment.get(DIRECTORY_VARIABLE, "")
    is_asked = bool(rules or directory)
    path = Path(directory) if directory else None
    _SWITCH.points = Failpoints(service, rules, path) if is_asked else None


def failpoint(name: str, *, job_id: str = "", model: str = "") -> None:
    """Pass a point in code that does not await. Raises Unavailable where a rule says `fail`."""
    if _SWITCH.points is None:
        return
    rule = _SWITCH.points.find(name, job_id, model)
    if rule is not None:
        if rule.action is Action.DELAY:
            time.sleep(rule.argument)
        _strike(rule)


async def failpoint_async(name: str, *, model: str = "") -> None:
    """Pass a point in a coroutine: a delay lets the event loop go on."""
    if _SWITCH.points is None:
        return
    rule = _SWITCH.points.find(name, "", model)
    if rule is not None:
        if rule.action is Action.DELAY:
            await asyncio.sleep(rule.argument)
        _strike(rule)


def _strike(rule: Rule) -> None:
    pid = int(rule.argument) or os.getpid()
    match rule.action:
        case Action.KILL:
            os.kill(pid, signal.SIGKILL)
        case Action.STOP:
            os.kill(pid, signal.SIGSTOP)
        case Action.FAIL:
            raise Unavailable(f"failpoint {rule.name}", code="failpoint")
        case Action.DELAY:
            pass


def _append(path: Path, line: bytes) -> None:
    """Append in one write: what a process wrote outlives its SIGKILL."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(descriptor, line)
    finally:
        os.close(descriptor)
