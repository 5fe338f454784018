"""What is read of a model beside its chunks: small files and its canary, wherever the model is."""

import asyncio
from collections.abc import Callable

from gearfall.core.ids import ModelName
from gearfall.core.tiers import Tier
from services.store.loading.load import LoadFlight
from services.store.models.canaries import Canaries
from services.store.models.catalogue import Catalogue
from services.store.sources.elsewhere import Elsewhere
from services.store.tiers.ssd_tier import SsdTier


class SideFiles:
    """Reads from the disk, or from where the model is; what is asked for may cause a load."""

    def __init__(
        self,
        ssd: SsdTier,
        catalogue: Catalogue,
        elsewhere: Elsewhere,
        canaries: Canaries,
    ) -> None:
        self._ssd = ssd
        self._catalogue = catalogue
        self._elsewhere = elsewhere
        self._canaries = canaries

    def is_far(self, name: ModelName) -> bool:
        """Whether a model that can be had has no bytes on this node's disk."""
        return name not in self._ssd.models and self._elsewhere.size_of(name) is not None

    async def read_file(self, name: ModelName, file: str) -> bytes:
        """Return a small file that the model's manifest lists. Raises NotFound.

        One of a model that is not here comes from where the model is.
        """
        model = self._catalogue.models.get(name)
        if model is None and self.is_far(name):
            return await self._elsewhere.read_file(name, file)
        if model is None or name in self._ssd.models:
            model = self._ssd.get(name)
        return await asyncio.to_thread(model.read_file, file)

    async def read_canary(self, name: ModelName, load: Callable[[Tier], LoadFlight]) -> bytes:
        """Return a model's canary as JSON, once it is recorded. Raises NotFound, InvalidRequest.

        `load` brings the model up to a tier.
        """
        if self.is_far(name):
            recorded = await self._find_far(name)
            if recorded is not None:
                return recorded
            # It is computed from the bytes, which the load that it guards is about to need too.
            # All the way up: a load to SSD alone would be read a second time from there.
            await load(Tier.DRAM).wait()
        if name not in self._ssd.models:
            # In memory only: its file made room for another on the disk.
            await load(Tier.SSD).wait()
        return await self._canaries.read(self._ssd.get(name))

    async def _find_far(self, name: ModelName) -> bytes | None:
        """Look before the bytes are here: the engine computes the canary behind them."""
        entry = self._catalogue.models.get(name)
        recorded = await self._canaries.find(entry) if entry is not None else None
        return recorded or await self._elsewhere.read_canary(name)
