"""A memory control group of one's own, where the machine and our rights have that."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

_V1 = Path("/sys/fs/cgroup/memory")
_V2 = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class MemoryGroup:
    directory: Path

    def start(self, program: str, *arguments: str) -> subprocess.Popen[str]:
        """Run Python code in the group, every page of it counted."""
        enter = 'echo $$ > "$1" && shift && exec "$@"'
        command = [sys.executable, "-c", program, *arguments]
        return subprocess.Popen(
            ["sh", "-c", enter, "sh", str(self.directory / "cgroup.procs"), *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def shared_bytes(self) -> int:
        """Shared memory that the group pays for."""
        fields = dict(
            line.split() for line in (self.directory / "memory.stat").read_text().splitlines()
        )
        return int(fields["shmem"])


@contextlib.contextmanager
def memory_group(limit_bytes: int | None = None) -> Iterator[MemoryGroup]:
    """Make a group for the length of a block; skips the test where that is not permitted."""
    is_v1 = _V1.is_dir()
    top = _V1 if is_v1 else _V2
    limit = "memory.limit_in_bytes" if is_v1 else "memory.max"
    directory = top / f"gearfall-test-{os.getpid()}"
    try:
        directory.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    try:
        if not (directory / limit).exists():
            pytest.skip("control groups here do not govern memory")
        if limit_bytes is not None:
            (directory / limit).write_text(str(limit_bytes))
        yield MemoryGroup(directory)
    finally:
        directory.rmdir()
