"""Writes what was deployed down again when cluster state lost its memory: routers remember it.

Models come back with the stores that have them; deployments, gear plans and what became of those
plans stand nowhere else.
"""

import asyncio
import contextlib
import logging

from gearfall.core.errors import Unavailable
from gearfall.infra.state.cluster import Cluster

LASTING = frozenset({"models", "deployments", "gear_plans", "drift"})
"""Kinds that a router goes on with when state has forgotten them."""
RESTORED = frozenset({"deployments", "gear_plans", "drift"})
RETRY_S = 0.5

_log = logging.getLogger(__name__)


async def restore_what_is_lost(cluster: Cluster) -> None:
    """Follow the cluster for ever; write back after each loss. Safe in several routers at once."""
    restored = cluster.view.losses
    async with contextlib.aclosing(cluster.changes()) as changes:
        async for _ in changes:
            losses = cluster.view.losses
            if losses != restored:
                _log.warning("cluster state lost its memory: writing deployments back")
                await _write_back(cluster)
                restored = losses


async def _write_back(cluster: Cluster) -> None:
    while True:
        try:
            return await cluster.write_back(RESTORED)
        except Unavailable as error:
            _log.warning("could not write back", extra={"error": error.message})
            await asyncio.sleep(RETRY_S)
