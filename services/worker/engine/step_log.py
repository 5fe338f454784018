"""Writes what each step of an engine took, for who looks into its speed: one file an engine.

Off unless GEARFALL_STEP_LOG names a directory. A record is written by one `write`: it outlives the
SIGKILL of its process, and a file ends with a whole one unless it is being written.
"""

import os
import struct
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

STEP_LOG_VARIABLE = "GEARFALL_STEP_LOG"
_RECORD = struct.Struct("<dIff")
_SUFFIX = ".steps"


@dataclass(frozen=True, slots=True)
class LoggedStep:
    """One step."""

    end_s: float
    """On the machine's monotonic clock, which all processes share."""
    tokens: int
    """Computed, of prompts and of answers."""
    step_s: float
    core_s: float
    """Of it, processor time of the engine's own thread: neither who else computed on its core nor
    who took the machine's is in it."""


class StepLog:
    """The open log of one engine process."""

    def __init__(self, directory: Path) -> None:
        """Create the file."""
        path = directory / f"{os.getpid()}{_SUFFIX}"
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self.begun_core_s = 0.0
        """Processor time when the running step began."""

    def begin(self) -> None:
        """A step begins."""
        self.begun_core_s = time.thread_time()

    def end(self, tokens: int, step_s: float) -> None:
        """Append the step that began last."""
        core_s = time.thread_time() - self.begun_core_s
        os.write(self._file, _RECORD.pack(time.monotonic(), tokens, step_s, core_s))


def open_step_log(environment: Mapping[str, str]) -> StepLog | None:
    """Return this process's log if `environment` asks for one."""
    directory = environment.get(STEP_LOG_VARIABLE, "")
    return StepLog(Path(directory)) if directory else None


def read_step_logs(directory: Path, since_s: float = 0.0) -> Mapping[int, tuple[LoggedStep, ...]]:
    """Return the steps that ended after `since_s` of each engine, by its process id."""
    paths = directory.glob(f"*{_SUFFIX}")
    return {int(path.stem): tuple(_steps(path, since_s)) for path in paths}


def _steps(path: Path, since_s: float) -> Iterator[LoggedStep]:
    data = path.read_bytes()
    whole = len(data) - len(data) % _RECORD.size
    for record in _RECORD.iter_unpack(data[:whole]):
        if record[0] > since_s:
            yield LoggedStep(*record)
