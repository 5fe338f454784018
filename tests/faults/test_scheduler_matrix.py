"""The leader killed and frozen before and behind each of its writes, with another one waiting.

Judged by what cluster state showed: nothing placed twice or beyond its room, nobody who waits left
waiting, every write under the fence of who led; a frozen leader's write fails when it wakes.

`make faults-scheduler` runs all; the normal run takes a sample.
"""

import asyncio
import itertools
import os
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from itertools import product

import pytest

from gearfall.core.ids import ModelName
from gearfall.core.records import ModelRecord
from gearfall.infra.state.cluster_view import ClusterView
from tests.faults.fault_cluster import thaw, until
from tests.faults.placement_verdict import StateChange
from tests.faults.scheduler_cluster import (
    LEASE_TTL_S,
    MIB,
    Played,
    SchedulerCluster,
    played_model,
    played_worker,
)

LARGE = played_worker("large", max_replicas=1)
SMALL = played_worker("small", memory_bytes=300 * MIB)
ALL = os.environ.get("GEARFALL_FAULTS") == "all"
TAKEOVER_S = LEASE_TTL_S + 2.0
WRITES = (
    *("assign", "unassign", "decide", "undecide"),
    *("learn", "move", "moved", "wish", "unwish"),
)
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
SAMPLE = {"assign-before-stop", "unassign-before-kill", "move-after-kill", "moved-before-stop"}


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
    async with cluster.played(LARGE) as played:
        scenario = await begin(played, case)
        before = len(cluster.struck())
        cluster.arm(f"{case.point}={case.signal}@1")
        await scenario.provoke()
        struck = await struck_pid(cluster, before)
        struck_unix_s = time.time()
        other = played_model(f"m{next(_numbers)}", LARGE, SMALL)
        await played.want(other, since_unix_s=time.time())
        await played.serve(other.name)
        await scenario.settle()
        if case.signal == "stop":
            thaw(struck)
            await wakes_deposed(cluster, case, struck)
        recorded = await played.recorded()
    verdict = cluster.judge(recorded)
    assert verdict.is_sound, verdict
    assert takeover_s(recorded, struck_unix_s) < TAKEOVER_S or not ALL


@dataclass(frozen=True, slots=True)
class Scenario:
    """What brings a leader to a write, and what must have come of it in the end."""

    provoke: Callable[[], Awaitable[None]]
    settle: Callable[[], Awaitable[object]]


async def begin(played: Played, case: Case) -> Scenario:
    """Prepare what a case needs: a model to start, one to give back, or one to move."""
    first = played_model(f"m{next(_numbers)}", LARGE, SMALL)
    if case.write == "unassign":
        await start(played, first)
        return Scenario(
            lambda: remove(played, first.name),
            lambda: played.until(lambda view: not is_hosted(view, first.name)),
        )
    if case.write == "undecide":
        await start(played, first)
        return Scenario(
            lambda: remove(played, first.name),
            lambda: played.until(lambda view: first.name not in view.decisions),
        )
    if case.write in ("wish", "unwish"):
        return await begin_prefetch(played, case)
    if case.write not in ("move", "moved"):
        await played.register(SMALL)
        return Scenario(lambda: want(played, first), lambda: played.serve(first.name))
    played.busy.add(first.name)
    await start(played, first)
    await played.register(SMALL)
    large = played_model(f"m{next(_numbers)}", LARGE, SMALL, size_bytes=300 * MIB)
    return Scenario(lambda: want(played, large), lambda: moved(played, first.name, large.name))


async def begin_prefetch(played: Played, case: Case) -> Scenario:
    """A model that was asked for lately is worth to have near; one that was removed is not."""
    asked = played_model(f"m{next(_numbers)}", LARGE, SMALL, size_bytes=100 * MIB)
    await played.register(SMALL)
    await played.cluster.put_model(asked)
    if case.write == "wish":
        return Scenario(
            lambda: played.note_arrivals(asked.name, times=10),
            lambda: ask_until_wished(played, asked.name),
        )
    await ask_until_wished(played, asked.name)
    return Scenario(
        lambda: remove(played, asked.name),
        lambda: played.until(lambda view: not is_wished(view, asked.name)),
    )


async def ask_until_wished(played: Played, model: ModelName) -> None:
    async def ask() -> bool:
        await played.note_arrivals(model, times=1)
        return is_wished(played.view, model)

    await until(ask, bool)


def is_wished(view: ClusterView, model: ModelName) -> bool:
    return any(name == model for _, name in view.prefetch)


async def want(played: Played, model: ModelRecord) -> None:
    await played.want(model, since_unix_s=time.time())


async def remove(played: Played, model: ModelName) -> None:
    await played.cluster.delete_model(model)


async def start(played: Played, model: ModelRecord) -> None:
    """Have it on the large worker, which is the only one as yet."""
    await want(played, model)
    await played.serve(model.name)


def is_hosted(view: ClusterView, model: ModelName) -> bool:
    return any(name == model for _, name in (*view.assignments, *view.replicas))


async def moved(played: Played, first: ModelName, large: ModelName) -> None:
    """Return when the large model has the large worker and the other one goes on elsewhere."""
    await played.serve(large)
    view = await played.until(lambda view: not view.moves)
    assert (LARGE.worker_id, large) in view.replicas
    assert (SMALL.worker_id, first) in view.replicas


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
