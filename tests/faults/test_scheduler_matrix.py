"""The leader killed and frozen before and behind each of its writes, with another one waiting.

Judged by what cluster state showed: nothing placed twice or beyond its room, nobody who waits left
waiting, every write under the fence of who led; a frozen leader's write fails when it wakes.

`make faults-scheduler` runs all; the normal run takes a sample.
"""

import asyncio
import itertools
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import pytest

from gearfall.core.ids import ModelName
from gearfall.core.placement_verdict import StateChange
from tests.faults.fault_cluster import thaw, until
from tests.faults.scheduler_cluster import (
    LEASE_TTL_S,
    Played,
    SchedulerCluster,
    played_model,
    played_worker,
)

ALL = os.environ.get("GEARFALL_FAULTS") == "all"
TAKEOVER_S = LEASE_TTL_S + 2.0
WRITES = ("assign", "unassign", "decide", "learn")
_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class Case:
    """What happens to the leader at a point."""

    write: str
    when: str
    signal: str

    @property
    def point(self) -> str:
        return f"scheduler.{self.write}.{self.when}"

    def __str__(self) -> str:
        return f"{self.write}-{self.when}-{self.signal}"


CASES = [Case(*each) for each in product(WRITES, ("before", "after"), ("kill", "stop"))]
SAMPLE = {"assign-before-stop", "assign-after-kill", "unassign-before-kill", "learn-before-stop"}


def test_the_sample_is_of_the_matrix() -> None:
    assert {str(case) for case in CASES} >= SAMPLE


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SchedulerCluster]:
    started = SchedulerCluster(tmp_path_factory.mktemp("schedulers"))
    try:
        yield started
    finally:
        started.close()


@pytest.mark.parametrize("case", [c for c in CASES if ALL or str(c) in SAMPLE], ids=str)
async def test_a_leader_struck_at_a_write(cluster: SchedulerCluster, case: Case) -> None:
    cluster.arm()
    cluster.start_missing()
    pair = (played_worker("v"), played_worker("w"))
    async with cluster.played(*pair) as played:
        before = len(cluster.struck())
        first, second = (played_model(f"m{next(_numbers)}", *pair) for _ in range(2))
        if case.write == "unassign":
            await played.want(first, since_unix_s=time.time())
            await played.serve(first.name)
        rule = f"{case.point}={case.signal}@1"
        cluster.arm(rule)
        await provoke(played, case, first)
        struck = await struck_pid(cluster, before)
        struck_unix_s = time.time()
        await played.want(second, since_unix_s=time.time())
        await played.serve(second.name)
        await settle(played, case, first.name)
        if case.signal == "stop":
            thaw(struck)
            await wakes_deposed(cluster, case, struck)
        else:
            cluster.start_missing()
        await played.serve(second.name)
        recorded = list(played.recorded)
    verdict = cluster.judge(recorded)
    assert verdict.is_sound, verdict
    assert takeover_s(recorded, struck_unix_s) < TAKEOVER_S or not ALL


async def provoke(played: Played, case: Case, model) -> None:
    """Have the leader come to the write."""
    if case.write == "unassign":
        await played.cluster.delete_model(model.name)
    else:
        await played.want(model, since_unix_s=time.time())


async def settle(played: Played, case: Case, model: ModelName) -> None:
    """Return when what the struck leader was about is done by the other."""
    if case.write == "unassign":
        await played.until(
            lambda view: all(name != model for _, name in (*view.assignments, *view.replicas))
        )
    else:
        await played.serve(model)


async def struck_pid(cluster: SchedulerCluster, before: int) -> int:
    """Return the process that the rule struck."""
    struck = await until(
        lambda: asyncio.to_thread(cluster.struck), lambda found: len(found) > before
    )
    return int(struck[-1]["pid"])


async def wakes_deposed(cluster: SchedulerCluster, case: Case, pid: int) -> None:
    """A leader frozen before a write finds it refused; one frozen behind it leads no more."""
    if case.when == "before":
        await until(lambda: asyncio.to_thread(cluster.refused_of, pid), bool)


def takeover_s(recorded, struck_unix_s: float) -> float:
    """Return the seconds from the strike until another one led."""
    led = [
        change.at_unix_s
        for change in recorded
        if isinstance(change, StateChange) and change.kind == "leader" and change.record
    ]
    return min(at for at in led if at > struck_unix_s) - struck_unix_s
