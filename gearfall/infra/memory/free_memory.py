"""How much memory may still be taken: by the machine, and by the control groups of this process.

A page that a control group does not grant kills the process that touches it, so that whoever takes
memory for convenience looks first.
"""

import errno
from collections.abc import Iterator
from pathlib import Path

_V2 = ("memory.max", "memory.current", ("inactive_file", "active_file"))
_V1 = (
    "memory.limit_in_bytes",
    "memory.usage_in_bytes",
    ("total_inactive_file", "total_active_file"),
)


def free_memory_bytes(root: Path = Path("/")) -> int:
    """Return what the tightest limit leaves, the page cache counted as free.

    Raises OSError where the kernel does not tell.
    """
    available_kib = _fields(root / "proc/meminfo").get("MemAvailable:")
    if available_kib is None:
        raise OSError(errno.ENOSYS, "the kernel does not tell how much memory is available")
    found = [available_kib * 1024]
    for directory in _groups(root):
        for limit, usage, reclaimable in (_V2, _V1):
            granted = _number(directory / limit)
            taken = _number(directory / usage)
            if granted is not None and taken is not None:
                cache = _fields(directory / "memory.stat")
                found.append(granted - taken + sum(cache.get(name, 0) for name in reclaimable))
    return max(0, min(found))


def _groups(root: Path) -> Iterator[Path]:
    """Yield this process's memory groups, each with those above it.

    Inside a container the path may be the host's: what is not there says nothing.
    """
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        group = top / path.lstrip("/")
        yield from (group, *(above for above in group.parents if above.is_relative_to(top)))


def _number(path: Path) -> int | None:
    """Return a file's number; None where there is no such file or no limit in it."""
    try:
        text = path.read_text().strip()
    except FileNotFoundError:
        return None
    return int(text) if text.isdecimal() else None


def _fields(path: Path) -> dict[str, int]:
    try:
        lines = path.read_text().splitlines()
    except FileNotFoundError:
        return {}
    return {words[0]: int(words[1]) for line in lines if len(words := line.split()) > 1}
