"""Brings models from where else they are: a neighbour's store, then the URL they came from."""

import asyncio
import logging
import os
import shutil
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

from gearfall.checkpoint.directory import disk_errors, write_file
from gearfall.core.checkpoint.manifest import MANIFEST_FILE
from gearfall.core.errors import CorruptCheckpoint, GearfallError, NotFound
from gearfall.core.ids import ModelName
from gearfall.core.records import ModelRecord
from gearfall.core.tiers import Tier
from gearfall.infra.memory.native import PoolFile
from gearfall.infra.net.remote import is_url
from gearfall.infra.state.cluster import Cluster
from services.store.loading.filling import Filling
from services.store.loading.load import Load, LoadProgress
from services.store.models.canaries import CANARY_FILE
from services.store.models.catalogue import Catalogue
from services.store.models.model_registry import ModelRegistry
from services.store.models.remote_checkpoint import open_remote
from services.store.sources.arrival import bring
from services.store.sources.neighbour import NeighbourCheckpoint, read_canary
from services.store.sources.relay import Origin, Place, Relay
from services.store.tiers.pool import Resident
from services.store.tiers.pool_memory import Allocate
from services.store.tiers.ssd_room import SsdRoom
from services.store.tiers.ssd_tier import SsdTier
from services.store.tiers.stored_model import ORIGIN_FILE, StoredModel, origin_bytes

_log = logging.getLogger(__name__)


class ClusterCopies:
    """Who else has a model, by cluster state and by the URLs that models came from."""

    def __init__(self, cluster: Cluster, registry: ModelRegistry, catalogue: Catalogue) -> None:
        self._cluster = cluster
        self._registry = registry
        self._catalogue = catalogue

    def has_others(self, model: StoredModel) -> bool:
        """Whether, as far as is known, the bytes are also somewhere else."""
        record = self._cluster.view.models.get(model.name)
        return is_url(model.source) or (record is not None and bool(self._registry.others(record)))

    async def give_up(self, model: StoredModel) -> bool:
        """Say that this node holds the bytes no longer; False, unsaid, if nobody else does."""
        if is_url(model.source):
            await asyncio.to_thread(self._catalogue.keep, model)
            return True
        return await self._registry.give_up(model.name)


class Elsewhere:
    """What is known of other places; each fetch ends whole on the SSD tier or leaves nothing."""

    def __init__(
        self,
        cluster: Cluster,
        registry: ModelRegistry,
        *,
        catalogue: Catalogue,
        ssd: SsdTier,
        room: SsdRoom,
        on_arrived: Callable[[], None],
        memory_for: Callable[[ModelName], Allocate],
    ) -> None:
        """`memory_for` says where a model's pool memory comes from."""
        self._cluster = cluster
        self._registry = registry
        self._catalogue = catalogue
        self._ssd = ssd
        self._room = room
        self._on_arrived = on_arrived
        self._memory_for = memory_for
        self._canaries: dict[tuple[ModelName, str], bytes] = {}
        """Neighbours' canaries, by model and digest, until the bytes are here."""

    def size_of(self, model: ModelName) -> int | None:
        """Bytes of a model that can be fetched; None for one that nobody here has heard of."""
        entry = self._catalogue.models.get(model)
        if entry is not None:
            return entry.manifest.size_bytes
        record = self._record(model)
        if record is None or not (self._registry.others(record) or is_url(record.source)):
            return None
        return record.size_bytes

    async def fetch(self, model: ModelName, load: Load, *, is_pooled: bool) -> Resident | None:
        """Put a model on the SSD tier and, if asked, into pool memory; return the latter.

        Tries one place after the other; raises what the last one said.
        """
        async with self._relayed(model) as relay:
            load.flight.publish(LoadProgress(Tier.REMOTE, 0, load.flight.progress.total_bytes))
            return await self._receive(model, relay, load, is_pooled=is_pooled)

    async def read_file(self, model: ModelName, file: str) -> bytes:
        """Return a small file of a model whose bytes are not here. Raises NotFound."""

        async def read(origin: Origin) -> bytes | None:
            entry = next((each for each in origin.manifest.files if each.name == file), None)
            return None if entry is None else await origin.read_file(entry)

        async with self._relayed(model) as relay:
            content = await relay.ask(read)
        if content is None:
            raise NotFound(f"model {model!r} has no file {file[:96]!r}", param="file")
        return content

    async def read_canary(self, model: ModelName) -> bytes | None:
        """Return a neighbour's canary of a model; None where no neighbour has one.

        It is kept beside the bytes when they arrive.
        """
        record = self._record(model)
        for node_id in () if record is None else self._registry.others(record):
            assert record is not None
            address = self._cluster.view.nodes[node_id].address
            try:
                content = await read_canary(address, model)
            except GearfallError as error:
                extra = {"model": model, "place": address, "error": error.message}
                _log.warning("canary not fetched", extra=extra)
            else:
                self._canaries[model, record.digest] = content
                return content
        return None

    @asynccontextmanager
    async def _relayed(self, model: ModelName) -> AsyncIterator[Relay]:
        relay = Relay(model, self._places(model))
        try:
            await relay.open()
            yield relay
        finally:
            await relay.close()

    def _record(self, model: ModelName) -> ModelRecord | None:
        record = self._cluster.view.models.get(model)
        return None if record is None or record.is_removing else record

    def _places(self, model: ModelName) -> Sequence[Place]:
        record, entry = self._record(model), self._catalogue.models.get(model)
        digest = entry.digest if entry is not None else record.digest if record is not None else ""
        places: list[Place] = []
        if record is not None and record.digest == digest:
            for node_id in self._registry.others(record):
                address = self._cluster.view.nodes[node_id].address
                places.append((address, partial(_open_neighbour, address, model, digest)))
        url = self._source(model)
        if is_url(url):
            places.append((url, partial(_open_url, url, digest)))
        return places

    def _source(self, model: ModelName) -> str:
        entry, record = self._catalogue.models.get(model), self._record(model)
        return entry.source if entry is not None else record.source if record is not None else ""

    async def _receive(
        self, model: ModelName, relay: Relay, load: Load, *, is_pooled: bool
    ) -> Resident | None:
        origin, manifest = relay.origin, relay.origin.manifest
        if manifest.size_bytes != load.flight.progress.total_bytes:
            raise CorruptCheckpoint(f"model {model!r} is not of the size it was registered with")
        await self._room.reserve(model, manifest.size_bytes)
        try:
            with self._ssd.incoming(model) as incoming:
                files = await relay.ask(lambda place: place.read_files())
                fds = await bring(
                    manifest,
                    relay,
                    incoming,
                    is_pooled=is_pooled,
                    report=load.report,
                    gate=load.go_on,
                    allocate=self._memory_for(model),
                    hand_out=partial(_hand_out, model, origin, load),
                    places=relay,
                )
                try:
                    await asyncio.to_thread(self._install, model, incoming, origin, files)
                except BaseException:
                    for fd in fds:
                        os.close(fd)
                    raise
        finally:
            self._room.release(model)
        self._on_arrived()
        if not is_pooled:
            return None
        sizes = tuple(partition.size_bytes for partition in manifest.partitions)
        return Resident(model, origin.digest, origin.manifest_json, fds, sizes)

    def _install(
        self, model: ModelName, incoming: Path, origin: Origin, files: dict[str, bytes]
    ) -> None:
        entry, record = self._catalogue.models.get(model), self._record(model)
        base = entry.base if entry is not None else record.base if record is not None else ""
        with disk_errors():
            for name, content in files.items():
                write_file(incoming / name, content)
            write_file(incoming / MANIFEST_FILE, origin.manifest_json)
            write_file(incoming / ORIGIN_FILE, origin_bytes(self._source(model), base))
            canary = self._canaries.pop((model, origin.digest), None)
            if entry is not None and (entry.directory / CANARY_FILE).exists():
                shutil.copy(entry.directory / CANARY_FILE, incoming / CANARY_FILE)
            elif canary is not None:
                write_file(incoming / CANARY_FILE, canary)
            self._ssd.install(model, incoming)


def _hand_out(
    model: ModelName, origin: Origin, load: Load, files: Sequence[PoolFile]
) -> Callable[[int, int], None]:
    """Let holders in on the memory that is about to be filled."""
    filling = Filling.over(model, origin.digest, origin.manifest_json, files)
    load.begin_filling(filling)
    return filling.advance


async def _open_neighbour(address: str, model: ModelName, digest: str) -> Origin:
    origin = NeighbourCheckpoint(address, model, digest)
    try:
        await origin.open()
    except BaseException:
        await origin.close()
        raise
    return origin


async def _open_url(url: str, digest: str) -> Origin:
    origin = await open_remote(url)
    if origin.digest != digest:
        raise CorruptCheckpoint(f"{url} holds another checkpoint than was registered")
    return origin
