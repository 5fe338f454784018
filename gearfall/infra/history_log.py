"""Writes and reads the histories of processes: one file a process, one JSON line an event.

Off unless GEARFALL_HISTORY names a directory. A line is written by one `write`: it outlives the
SIGKILL of its process. SIGUSR1 makes a process that writes a history say what it holds.
"""

import os
import re
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import ParamSpec

import msgspec

from gearfall.core.errors import DeadlineExceeded, InvalidRequest
from gearfall.core.generation.history import (
    AnyEvent,
    Event,
    Holding,
    ProcessEnded,
    ProcessHistory,
    ProcessStarted,
)

HISTORY_VARIABLE = "GEARFALL_HISTORY"
ASK_SIGNAL = signal.SIGUSR1

P = ParamSpec("P")

_SUFFIX = ".jsonl"
_LOOK_AGAIN_S = 0.01
_ENCODER = msgspec.json.Encoder()
_DECODER: msgspec.json.Decoder[AnyEvent] = msgspec.json.Decoder(AnyEvent)


class HistoryLog:
    """The history of one process, open for appending."""

    def __init__(self, directory: Path, service: str) -> None:
        """Create the file and write the process's start."""
        pid = os.getpid()
        start = ProcessStarted(service, pid, os.getppid(), start_ticks(pid))
        path = directory / f"{service}-{pid}-{start.start_ticks}{_SUFFIX}"
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._counters: dict[str, Callable[[], int]] = {}
        self.write(start)

    def write(self, event: Event) -> None:
        """Append one event."""
        os.write(self._file, _ENCODER.encode(event) + b"\n")

    def count(self, what: str, counter: Callable[[], int]) -> None:
        """Have `counter` say how many of `what` the process holds."""
        self._counters[what] = counter

    def write_holding(self) -> None:
        """Append what the process holds now."""
        self.write(Holding({what: counter() for what, counter in self._counters.items()}))

    def close(self) -> None:
        """Append what is held at the end, and the end."""
        self.write_holding()
        self.write(ProcessEnded())
        os.close(self._file)


class _Switch:
    """Whether this process writes a history: one for the process, as events come from anywhere."""

    __slots__ = ("log",)

    def __init__(self) -> None:
        self.log: HistoryLog | None = None


_SWITCH = _Switch()


def open_history(service: str, environment: Mapping[str, str]) -> None:
    """Begin this process's history if `environment` asks for one, and answer SIGUSR1."""
    directory = environment.get(HISTORY_VARIABLE, "")
    if not directory:
        _SWITCH.log = None
        return
    log = HistoryLog(Path(directory), service)

    def say_held(_number: int, _frame: FrameType | None) -> None:
        if _SWITCH.log is log:
            log.write_holding()

    signal.signal(ASK_SIGNAL, say_held)
    _SWITCH.log = log


def close_history() -> None:
    """End this process's history in order. Idempotent."""
    log, _SWITCH.log = _SWITCH.log, None
    if log is not None:
        log.close()


def record(make: Callable[P, Event], *args: P.args, **kwargs: P.kwargs) -> None:
    """Append the event that `make` returns; without a history nothing is made."""
    if _SWITCH.log is not None:
        _SWITCH.log.write(make(*args, **kwargs))


def count_held(what: str, counter: Callable[[], int]) -> None:
    """Have `counter` say, when asked, how many of `what` this process holds."""
    if _SWITCH.log is not None:
        _SWITCH.log.count(what, counter)


def read_histories(directory: Path) -> tuple[ProcessHistory, ...]:
    """Return the histories in `directory`; raise InvalidRequest for a line that is not an event.

    A last line that was cut is left out: its process may be writing it.
    """
    paths = sorted(directory.glob(f"*{_SUFFIX}"))
    histories = (_read_file(path) for path in paths)
    return tuple(history for history in histories if history is not None)


def _read_file(path: Path) -> ProcessHistory | None:
    lines = path.read_bytes().split(b"\n")[:-1]
    try:
        events = tuple(_DECODER.decode(line) for line in lines)
    except msgspec.DecodeError as error:
        raise InvalidRequest(f"{path} is not a history: {error}") from None
    if not events:
        return None
    start = events[0]
    if not isinstance(start, ProcessStarted):
        raise InvalidRequest(f"{path} does not begin with a process's start")
    return ProcessHistory(start, events[1:])


def alive_pids(histories: Sequence[ProcessHistory]) -> frozenset[int]:
    """Return the ids of the processes that still run; a zombie does not."""
    return frozenset(
        history.start.pid
        for history in histories
        if start_ticks(history.start.pid) == history.start.start_ticks
    )


def ask_what_is_held(directory: Path, *, timeout_s: float) -> None:
    """Return when every other process that listens has said what it holds now.

    Raises DeadlineExceeded, naming one that has not, after `timeout_s`.
    """
    histories = read_histories(directory)
    alive = alive_pids(histories)
    said = {history.start: _times_said(history) for history in histories}
    waiting = {
        history.start
        for history in histories
        if history.start.pid in alive - {os.getpid()}
        and not history.has_ended
        and _listens(history.start.pid)
    }
    for start in waiting:
        os.kill(start.pid, ASK_SIGNAL)
    give_up_s = time.monotonic() + timeout_s
    while waiting:
        histories = read_histories(directory)
        alive = alive_pids(histories)
        waiting = {
            history.start
            for history in histories
            if history.start in waiting
            and history.start.pid in alive
            and _times_said(history) == said[history.start]
        }
        if waiting and time.monotonic() > give_up_s:
            one = next(iter(waiting))
            raise DeadlineExceeded(f"{one.service} {one.pid} did not say what it holds")
        time.sleep(_LOOK_AGAIN_S)


def _listens(pid: int) -> bool:
    """Whether the process has a handler for the signal, which would end it else."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    caught = int(status.partition("SigCgt:")[2].split()[0], 16)
    return bool(caught >> (ASK_SIGNAL - 1) & 1)


def _times_said(history: ProcessHistory) -> int:
    return sum(isinstance(event, Holding) for event in history.events)


def start_ticks(pid: int) -> int:
    """Return when a process started, in the kernel's ticks since boot; 0 when it does not run."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    # The name in brackets may hold anything.
    fields = re.sub(r".*\)", "", stat, flags=re.DOTALL).split()
    return 0 if fields[0] in {"Z", "X"} else int(fields[19])
