"""The SSD tier's books: how much it may hold, and what leaves to make room.

A model leaves only where its bytes are kept somewhere else: below its URL, or on another node's SSD
by the word of cluster state, where two nodes can't both give up the last copy. Its files are
removed behind the fetch that needs the room, where the disk has room for both: removing 1 GB takes
a disk as long as reading 300 MB.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from gearfall.core.errors import InvalidRequest, Overloaded
from gearfall.core.ids import ModelName
from gearfall.core.tiers import Candidate, choose_victims
from services.store.tiers.ssd_tier import SsdTier, remove_tree
from services.store.tiers.stored_model import StoredModel

_RETRY_S = 5.0
_log = logging.getLogger(__name__)


class Copies(Protocol):
    """Who else has a model."""

    def has_others(self, model: StoredModel) -> bool:
        """Whether, as far as is known, the bytes are also somewhere else."""
        ...

    async def give_up(self, model: StoredModel) -> bool:
        """Say that this node holds the bytes no longer; False, unsaid, if nobody else does."""
        ...


class SsdRoom:
    """Owns what is promised to conversions and fetches under way."""

    def __init__(
        self,
        capacity_bytes: int,
        ssd: SsdTier,
        copies: Copies,
        *,
        is_busy: Callable[[ModelName], bool],
        expected_use: Callable[[ModelName], float],
        bandwidth: Callable[[], float],
    ) -> None:
        """`capacity_bytes`: 0 for what the file system has. `is_busy`: leased or being loaded."""
        self._capacity_bytes = capacity_bytes
        self._disk_bytes = 0
        self._ssd = ssd
        self._copies = copies
        self._is_busy = is_busy
        self._expected_use = expected_use
        self._bandwidth = bandwidth
        self._reserved: dict[ModelName, int] = {}
        self.leaving: set[ModelName] = set()
        """On their way out: others no longer count on them, so they must not be published."""
        self._turn = asyncio.Lock()
        self._trash: list[Path] = []
        """Of models that have left; still on the disk."""
        self._emptying: asyncio.Task[None] | None = None

    @property
    def capacity_bytes(self) -> int:
        """Most bytes of models that the tier may hold."""
        self._disk_bytes = self._disk_bytes or self._ssd.space()[0]
        return min(self._capacity_bytes or self._disk_bytes, self._disk_bytes)

    @property
    def used_bytes(self) -> int:
        """Bytes of the models that are there and of those on their way."""
        return sum(self._sizes().values()) + sum(self._reserved.values())

    async def reserve(self, model: ModelName, size_bytes: int) -> None:
        """Set room aside, evicting what costs least to bring back; `release` gives it back.

        Raises InvalidRequest when the model is larger than the tier, Overloaded when too little of
        it can leave.
        """
        if size_bytes > self.capacity_bytes:
            raise InvalidRequest(
                f"model {model!r} takes {size_bytes} bytes and the SSD tier holds "
                f"{self.capacity_bytes}: start the store with a larger --ssd-bytes or disk",
                param="model",
            )
        async with self._turn:
            try:
                await self._make_room(model, size_bytes)
            except BaseException:
                # No fetch follows that would begin it in the end.
                if self._trash:
                    self._begin_emptying()
                raise
            self._reserved[model] = size_bytes

    def release(self, model: ModelName) -> None:
        """Give back what was set aside: the model is there, or will not come. Idempotent."""
        self._reserved.pop(model, None)
        if self._trash:
            self._begin_emptying()

    async def stop(self) -> None:
        """Return once nothing of evicted models is on the disk. Idempotent."""
        await self._empty()

    async def _make_room(self, model: ModelName, size_bytes: int) -> None:
        kept: set[ModelName] = {model}
        while (missing_bytes := await self._missing_bytes(size_bytes)) > 0:
            victims = choose_victims(self._candidates(kept), missing_bytes)
            if not victims:
                raise Overloaded(
                    f"no room for {model!r} on the SSD tier: {missing_bytes} bytes more are "
                    "in use or the only copy",
                    retry_after_s=_RETRY_S,
                )
            if not await self._evict(victims[0]):
                kept.add(victims[0])

    def _sizes(self) -> dict[ModelName, int]:
        # Copied in one step: registrations add to it from their threads.
        return {name: each.manifest.size_bytes for name, each in list(self._ssd.models.items())}

    async def _missing_bytes(self, size_bytes: int) -> int:
        # What is reserved may not be on the disk yet.
        if size_bytes + sum(self._reserved.values()) > self._free_bytes():
            await self._empty()
        return size_bytes - min(self.capacity_bytes - self.used_bytes, self._free_bytes())

    def _free_bytes(self) -> int:
        return self._ssd.space()[1]

    def _candidates(self, kept: set[ModelName]) -> Sequence[Candidate]:
        return [
            Candidate(name, model.manifest.size_bytes, self._bandwidth(), self._expected_use(name))
            for name, model in list(self._ssd.models.items())
            if name not in kept and not self._is_busy(name) and self._copies.has_others(model)
        ]

    async def _evict(self, name: ModelName) -> bool:
        self.leaving.add(name)
        try:
            if not await self._copies.give_up(self._ssd.models[name]):
                return False
            # Asked again: while we waited, somebody may have begun to load or lease it.
            if self._is_busy(name):
                return False
            await self._set_aside(name)
        finally:
            self.leaving.discard(name)
        _log.info("model evicted from SSD", extra={"model": name})
        return True

    async def _set_aside(self, name: ModelName) -> None:
        work = asyncio.create_task(asyncio.to_thread(self._ssd.set_aside, name, self._trash))
        try:
            await asyncio.shield(work)
        except asyncio.CancelledError:
            # Short, and only then it is known what there is to remove.
            await asyncio.wait((work,))
            raise

    def _begin_emptying(self) -> asyncio.Task[None]:
        if self._emptying is None or self._emptying.done():
            self._emptying = asyncio.create_task(self._remove_trash(), name="ssd-trash")
        return self._emptying

    async def _remove_trash(self) -> None:
        while self._trash:
            await asyncio.to_thread(remove_tree, self._trash.pop())

    async def _empty(self) -> None:
        await asyncio.shield(self._begin_emptying())
