"""Brings what the scheduler's leader wishes for on this node, and gives up what it no longer does.

A wish is a key in cluster state. It is followed as long as it stands: through a restart of the
store, and through an outage of cluster state with what was last known. It is brought once, as a
prefetch, behind every demand load; what leaves the tier again afterwards comes back by a new wish
only. A failed attempt is made again, with a growing pause. What leaves the pool for it is up to the
pool's own rule, which never touches what is leased.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from gearfall.core.errors import GearfallError
from gearfall.core.ids import ModelName, NodeId
from gearfall.core.records import PrefetchRecord
from gearfall.core.tiers import Tier
from gearfall.infra.state.cluster import Cluster
from services.store.loading.load import LoadFlight

_log = logging.getLogger(__name__)

PREFETCH_PRIORITY = -1
RETRY_S = 2.0
_RETRY_MOST_S = 60.0


class WishOutcome(Enum):
    """How one attempt at a wish ended."""

    BROUGHT = "brought"
    """The model is where it was wished, whoever brought it."""
    GIVEN_UP = "given_up"
    """The wish was taken back before."""
    FAILED = "failed"


class WishedTiers(Protocol):
    """What wishes need of a store."""

    def has(self, model: ModelName, tier: Tier) -> bool:
        """Whether the whole model is in the tier."""
        ...

    def load(self, name_text: str, priority: int = 0, target: Tier = Tier.DRAM) -> LoadFlight:
        """Return the flight that brings the model there."""
        ...

    def cancel_prefetch(self, name_text: str) -> bool:
        """Give up a load that nobody waits for."""
        ...


@dataclass(frozen=True, slots=True)
class _Followed:
    """A wish and the task that sees to it, which has ended once the model was there."""

    record: PrefetchRecord
    task: asyncio.Task[None]

    def is_for(self, record: PrefetchRecord | None) -> bool:
        """Whether there is nothing else to do for `record` than is done."""
        if record is None or record.tier is not self.record.tier:
            return False
        return not self.task.done() or record.wished_unix_s == self.record.wished_unix_s


class Wishes:
    """Owner of what this node does about its wishes."""

    def __init__(
        self,
        cluster: Cluster,
        node_id: NodeId,
        tiers: WishedTiers,
        *,
        on_ended: Callable[[WishOutcome], None],
        retry_s: float = RETRY_S,
    ) -> None:
        """`on_ended` is called for every attempt that ended."""
        self._cluster = cluster
        self._node_id = node_id
        self._tiers = tiers
        self._on_ended = on_ended
        self._retry_s = retry_s
        self._followed: dict[ModelName, _Followed] = {}

    @property
    def pending(self) -> Mapping[ModelName, Tier]:
        """Wishes that are not fulfilled yet."""
        open_ = self._followed.items()
        return {model: each.record.tier for model, each in open_ if not each.task.done()}

    async def run(self) -> None:
        """Follow the wishes until cancelled or the cluster is stopped."""
        try:
            async for kinds in self._cluster.changes():
                if "prefetch" in kinds:
                    self._reconcile()
        finally:
            for model in tuple(self._followed):
                self._give_up(model)

    def _reconcile(self) -> None:
        wished = {
            model: record
            for (node_id, model), record in self._cluster.view.prefetch.items()
            if node_id == self._node_id and record.tier in {Tier.SSD, Tier.DRAM}
        }
        for model, followed in tuple(self._followed.items()):
            if not followed.is_for(wished.get(model)):
                self._give_up(model)
        for model, record in wished.items():
            if model not in self._followed:
                task = asyncio.create_task(self._bring(model, record.tier), name=f"wish-{model}")
                self._followed[model] = _Followed(record, task)

    def _give_up(self, model: ModelName) -> None:
        followed = self._followed.pop(model)
        if followed.task.done():
            return
        followed.task.cancel()
        self._tiers.cancel_prefetch(model)
        self._on_ended(WishOutcome.GIVEN_UP)
        _log.info("wish given up", extra={"model": model, "tier": followed.record.tier.value})

    async def _bring(self, model: ModelName, tier: Tier) -> None:
        """Return once the model is there."""
        pause_s = self._retry_s
        while not self._tiers.has(model, tier):
            try:
                await self._tiers.load(model, PREFETCH_PRIORITY, tier).wait()
                break
            except GearfallError as error:
                self._on_ended(WishOutcome.FAILED)
                _log.warning("wish not fulfilled", extra={"model": model, "error": error.message})
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _RETRY_MOST_S)
        self._on_ended(WishOutcome.BROUGHT)
        _log.info("wish fulfilled", extra={"model": model, "tier": tier.value})
