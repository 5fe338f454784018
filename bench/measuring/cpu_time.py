"""CPU time of running processes, from Linux's /proc."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def cpu_seconds(pids: Mapping[str, int]) -> dict[str, float]:
    """Return user plus system time of each named process and its descendants; {} without /proc."""
    if not Path("/proc/self/stat").exists():
        return {}
    return {
        name: sum(own_cpu_seconds(each, with_ended=True) for each in _family(pid))
        for name, pid in pids.items()
    }


def parse_stat(text: str, *, with_ended: bool = False) -> float:
    """Return user plus system time in seconds from the text of /proc/PID/stat.

    `with_ended`: with that of children which have ended and were waited for.
    """
    fields = text.rpartition(")")[2].split()  # the name before it may hold spaces
    return sum(map(int, fields[11 : 15 if with_ended else 13])) / _TICKS_PER_S


def own_cpu_seconds(pid: int, *, with_ended: bool = False) -> float:
    """Return user plus system time of one process without its descendants; 0 once it is gone.

    `with_ended`: as in `parse_stat`.
    """
    try:
        return parse_stat(Path(f"/proc/{pid}/stat").read_text(), with_ended=with_ended)
    except (FileNotFoundError, ProcessLookupError):
        return 0.0


def _family(pid: int) -> Iterator[int]:
    """Yield a process and its descendants."""
    yield pid
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            pids = children.read_text().split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        for child in pids:
            yield from _family(int(child))
