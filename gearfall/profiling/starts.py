"""Measures how long a model takes to start, by the tier that its bytes come from.

A replica that is there says how it started. For more, the model gets a deployment of its own that
lets it go at once; each time it has gone it is asked again, and then starts from where its bytes
are: DRAM, where there is room for them.
"""

import asyncio
from collections.abc import Callable
from statistics import median

from gearfall.client import AsyncClient
from gearfall.core.errors import Conflict, Unavailable
from gearfall.core.ids import DeploymentName, ModelName
from gearfall.core.records import DeploymentRecord, Stage
from gearfall.core.tiers import Tier
from gearfall.infra.net.convert import TIER_FROM_PB
from gearfall.pb import common_pb2

KEEP_ALIVE_S = 1.0
"""Long enough to ask a replica how it started."""
GONE_WITHIN_S = 30.0
_LOOK_EVERY_S = 0.1


def start_of(replica: common_pb2.Replica) -> tuple[str, float]:
    """Return the tier that a ready replica started from, and the seconds it took.

    The first start after a registration waits for the canary; no later one does.
    """
    tier = TIER_FROM_PB.get(replica.timeline.from_tier, Tier.SSD)
    return tier.value, replica.timeline.total_s - replica.timeline.prepare_s


async def measure_starts(
    client: AsyncClient, model: str, count: int, progress: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """Return the median seconds of `count` more starts, by tier.

    Raises Conflict for a model that some deployment keeps, Unavailable when it does not go.
    """
    listed = await client.models()
    keeping = [
        each.name for each in listed.deployments if model in [stage.model for stage in each.stages]
    ]
    if keeping:
        raise Conflict(
            f"{model} is kept by {', '.join(keeping)}: starts are measured of models that no "
            "deployment names; remove it for that time, or profile without --starts"
        )
    name = DeploymentName(f"profile-{model}")
    await client.deploy(
        DeploymentRecord(name, (Stage(ModelName(model)),), keep_alive_s=KEEP_ALIVE_S)
    )
    seen: dict[str, list[float]] = {}
    try:
        for _ in range(count):
            await _until_gone(client, model)
            tier, seconds = await _start(client, model)
            seen.setdefault(tier, []).append(seconds)
            progress()
    finally:
        await client.remove_deployment(name)
    return {tier: median(found) for tier, found in seen.items()}


async def _start(client: AsyncClient, model: str) -> tuple[str, float]:
    """Ask the model for one token, and its replica for how it started, before it goes again."""
    await client.generate(model, [0], max_tokens=1, temperature=0.0, ignore_eos=True)
    for replica in await _replicas(client, model):
        if replica.state == common_pb2.REPLICA_STATE_READY:
            return start_of(replica)
    raise Unavailable(f"{model} went before it could be asked how it started: try again")


async def _until_gone(client: AsyncClient, model: str) -> None:
    try:
        async with asyncio.timeout(GONE_WITHIN_S):
            while await _replicas(client, model):  # noqa: ASYNC110 - the public door tells nobody
                await asyncio.sleep(_LOOK_EVERY_S)
    except TimeoutError:
        raise Unavailable(
            f"{model} did not go within {GONE_WITHIN_S:g} s: somebody asks it"
        ) from None


async def _replicas(client: AsyncClient, model: str) -> list[common_pb2.Replica]:
    workers = (await client.status()).workers
    return [each for worker in workers for each in worker.replicas if each.model == model]
