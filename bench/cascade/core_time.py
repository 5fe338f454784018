"""Core time of a local cluster, by kind of process: while nobody asks, and for each request."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from bench.measuring.cpu_time import cpu_seconds, own_cpu_seconds

Seconds = Mapping[str, float]
"""Core seconds by kind of process."""

ALL = "all"
HOST = "worker host"
ENGINES = "engines"
"""What a worker's host has forked: the zygote and the engine of each model."""


@dataclass(frozen=True, slots=True)
class Burst:
    """What one stretch of time cost, with or without requests."""

    cluster: str
    what: str
    """Model or deployment that was asked for; empty: nobody asked."""
    requests: int
    duration_s: float
    spent: Seconds

    def figures_ms(self) -> Seconds:
        """Return core milliseconds a request; a second where there were none."""
        count = self.requests or self.duration_s
        return {kind: 1000 * each / count for kind, each in self.spent.items()}


def spent_so_far(pids: Sequence[tuple[str, int]]) -> Seconds:
    """Return the core seconds of (service, pid) and their descendants, by kind."""
    spent: dict[str, float] = {}
    for service, pid in pids:
        own, whole = own_cpu_seconds(pid), cpu_seconds({service: pid})[service]
        is_worker = service == "worker"
        parts = {HOST: own, ENGINES: whole - own} if is_worker else {service: whole}
        for kind, seconds in parts.items():
            spent[kind] = spent.get(kind, 0.0) + seconds
    return {**spent, ALL: sum(spent.values())}


def difference(after: Seconds, before: Seconds) -> Seconds:
    """Return what was spent between two looks."""
    return {kind: after[kind] - before[kind] for kind in after}


def medians_ms(bursts: Iterable[Burst], cluster: str, what: str) -> Seconds:
    """Return each kind's median over the rounds of one cluster and what it was asked for."""
    rounds = [each.figures_ms() for each in bursts if (each.cluster, each.what) == (cluster, what)]
    return {kind: statistics.median(each[kind] for each in rounds) for kind in rounds[0]}


def ratios(bursts: Sequence[Burst], what: str, cluster: str, base: str) -> Sequence[float]:
    """Return, round by round, what a request costs one cluster over what it costs the other."""
    ours, theirs = (
        [each.figures_ms()[ALL] for each in bursts if (each.cluster, each.what) == (name, what)]
        for name in (cluster, base)
    )
    return [one / other for one, other in zip(ours, theirs, strict=True)]
