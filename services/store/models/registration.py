"""Registers models: converts a local directory, or notes a checkpoint below a URL."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from gearfall.core.errors import Conflict, GearfallError, Internal, InvalidRequest, Unavailable
from gearfall.core.ids import ModelName
from gearfall.core.records import ModelRecord
from gearfall.infra.net.remote import is_url
from services.store.loading.flight import Flight
from services.store.models.adapter_base import base_of_directory, base_of_facts
from services.store.models.canaries import Canaries
from services.store.models.catalogue import Catalogue
from services.store.models.model_registry import ModelRegistry
from services.store.models.remote_checkpoint import open_remote
from services.store.tiers.ssd_room import SsdRoom
from services.store.tiers.ssd_tier import SsdTier
from services.store.tiers.stored_model import StoredModel

_MAX_CONVERSIONS = 2
"""Keeps threads free for loads and small files, and the disk's head in few places."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RegisterProgress:
    """How far a registration is."""

    phase: str
    """check, convert, sync or done."""
    done_bytes: int = 0
    total_bytes: int = 0


RegisterFlight = Flight[RegisterProgress, ModelRecord]


class Registrations:
    """Owns the registrations under way; each ends whole and published, or leaves nothing."""

    def __init__(
        self,
        ssd: SsdTier,
        catalogue: Catalogue,
        *,
        room: SsdRoom,
        registry: ModelRegistry,
        canaries: Canaries,
        lock_of: Callable[[ModelName], asyncio.Lock],
        on_changed: Callable[[], None],
        wait_told: Callable[[], Awaitable[None]],
    ) -> None:
        """`lock_of`: held while a model is registered or removed.

        `on_changed` is called when the tiers hold something new, which the node's record shall say;
        `wait_told` returns once it does, or soon after.
        """
        self._ssd = ssd
        self._catalogue = catalogue
        self._room = room
        self._registry = registry
        self._canaries = canaries
        self._lock_of = lock_of
        self._on_changed = on_changed
        self._wait_told = wait_told
        self._works: set[asyncio.Task[None]] = set()
        self._flights: dict[tuple[ModelName, str, str], RegisterFlight] = {}
        self._conversions = asyncio.Semaphore(_MAX_CONVERSIONS)
        self._is_stopping = False

    def begin(self, name: ModelName, path: str, base: str = "") -> RegisterFlight:
        """Register a directory or a URL; the same registration under way is joined.

        `base` names the model that a LoRA adapter belongs to, where it does not say so itself.
        Errors come through the flight. It goes on when nobody follows any more.
        """
        flight = self._flights.get((name, path, base))
        if flight is None:
            flight = Flight(RegisterProgress("check"))
            self._flights[name, path, base] = flight
            task = asyncio.create_task(self._register(name, path, base, flight))
            self._works.add(task)
            task.add_done_callback(self._works.discard)
        return flight

    def stop(self) -> None:
        """Give up what is under way at its next block."""
        self._is_stopping = True

    async def wait_ended(self) -> None:
        """Cancel what is under way and wait for it."""
        for task in tuple(self._works):
            task.cancel()
            await asyncio.wait((task,))

    def discard(self, name: ModelName) -> None:
        """Forget a model and remove what is here of it. Blocks; idempotent."""
        self._catalogue.remove(name)
        self._ssd.remove(name)

    async def _register(
        self, name: ModelName, path: str, base: str, flight: RegisterFlight
    ) -> None:
        try:
            async with self._lock_of(name):
                flight.succeed(await self._convert_and_publish(name, path, base, flight))
            _log.info("model registered", extra={"model": name, "source": path})
        except asyncio.CancelledError:
            flight.fail(Unavailable("the store is stopping"))
            raise
        except GearfallError as error:
            _log.warning("model not registered", extra={"model": name, "error": error.message})
            flight.fail(error)
        except Exception as error:
            _log.exception("unexpected error in a registration", extra={"model": name})
            flight.fail(Internal(f"registering {name!r} failed: {type(error).__name__}"))
        finally:
            del self._flights[name, path, base]

    async def _convert_and_publish(
        self, name: ModelName, path: str, base: str, flight: RegisterFlight
    ) -> ModelRecord:
        loop = asyncio.get_running_loop()
        was_known = name in self._known()

        def report(done_bytes: int, total_bytes: int) -> None:
            if self._is_stopping:
                raise Unavailable("the store is stopping")
            phase = "convert" if done_bytes < total_bytes else "sync"
            progress = RegisterProgress(phase, done_bytes, total_bytes)
            loop.call_soon_threadsafe(flight.publish, progress)

        def admit(size_bytes: int) -> None:
            reserving = self._room.reserve(name, size_bytes)
            asyncio.run_coroutine_threadsafe(reserving, loop).result()

        try:
            if is_url(path):
                stored = await self._note_remote(name, path, base)
            elif name in self._catalogue.models:
                url = self._catalogue.models[name].source
                raise Conflict(f"model {name!r} is registered from {url}: remove it first")
            else:
                known = dict(self._known())
                async with self._conversions:
                    found = await asyncio.to_thread(base_of_directory, path, base, known)
                    stored = await asyncio.to_thread(
                        self._ssd.register, name, path, report, admit, base=found
                    )
        finally:
            self._room.release(name)
        if name in self._ssd.models and stored.manifest.adapter is None:
            self._canaries.record(stored)
        try:
            record = await self._registry.publish(stored)
        except Conflict:
            if not was_known:
                await asyncio.to_thread(self.discard, name)
            raise
        finally:
            # Also when state can't be reached: the model is whole, and published once it is back.
            self._on_changed()
        # Who predicts the first start shall know of the canary that it waits for.
        await self._wait_told()
        size_bytes = record.size_bytes
        flight.publish(RegisterProgress("done", size_bytes, size_bytes))
        return record

    async def _note_remote(self, name: ModelName, url: str, base: str) -> StoredModel:
        """Keep what is known of a checkpoint below a URL; its chunks come when they are needed."""
        remote = await open_remote(url)
        adapter = remote.manifest.adapter
        if adapter is None and base:
            raise InvalidRequest(f"{url} holds a model, not a LoRA adapter", param="base")
        found = None if adapter is None else base_of_facts(adapter, base, self._known())
        known = self._known().get(name)
        if known is not None:
            if known.digest != remote.digest:
                raise Conflict(
                    f"model {name!r} is registered with other bytes: remove it first", param="name"
                )
            return known
        files = await remote.read_files()
        return await asyncio.to_thread(
            self._catalogue.put,
            name,
            remote.manifest_json,
            files,
            url.rstrip("/"),
            "" if found is None else found.name,
        )

    def _known(self) -> Mapping[ModelName, StoredModel]:
        return {**self._catalogue.models, **self._ssd.models}
