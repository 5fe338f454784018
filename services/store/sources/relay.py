"""A checkpoint at the first of several places that has it, and at the next when that one fails."""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from typing import Protocol, TypeVar

from gearfall.core.checkpoint.manifest import FileEntry, Manifest
from gearfall.core.errors import GearfallError, NotFound, Unavailable
from gearfall.core.ids import ModelName
from services.store.sources.arrival import ByteSource

T = TypeVar("T")

_log = logging.getLogger(__name__)


class Origin(ByteSource, Protocol):
    """One checkpoint, opened where it is."""

    @property
    def manifest(self) -> Manifest:
        """What its bytes are."""
        ...

    @property
    def manifest_json(self) -> bytes:
        """The manifest as it lies there."""
        ...

    @property
    def digest(self) -> str:
        """Of the manifest."""
        ...

    async def read_file(self, entry: FileEntry) -> bytes:
        """Return one small file."""
        ...

    async def read_files(self) -> dict[str, bytes]:
        """Return the small files."""
        ...

    async def close(self) -> None:
        """Let go of it."""
        ...


Place = tuple[str, Callable[[], Awaitable[Origin]]]
"""What it is called, and how its checkpoint is opened: the same one, by digest, at each place."""


class Relay:
    """Asks one place at a time; implements `ByteSource` and `Places`. Close it when done."""

    def __init__(self, model: ModelName, places: Iterable[Place]) -> None:
        self._model = model
        self._left = deque(places)
        self._opened: list[Origin] = []
        self._current: Place | None = None
        self._is_second_try = False
        self._moving = asyncio.Lock()

    async def open(self) -> None:
        """Open the first place that can be. Raises Unavailable when none can."""
        await self.move_on(0, NotFound(f"model {self._model!r} is nowhere", param="model"))

    @property
    def origin(self) -> Origin:
        """The checkpoint at the place that is asked now."""
        return self._opened[-1]

    @property
    def place(self) -> int:
        """See `Places`."""
        return len(self._opened)

    @property
    def has_more(self) -> bool:
        """See `Places`."""
        return bool(self._left)

    async def move_on(self, place: int, error: GearfallError) -> None:
        """See `Places`. The first that stays away half way is asked once more, after all others."""
        async with self._moving:
            if self.place != place:
                return  # somebody else has seen to it
            if self._current is not None:
                self._report(self._current, error)
                self._put_last(self._current, error)
            while self._left:
                self._current = self._left.popleft()
                try:
                    self._opened.append(await self._current[1]())
                except (Unavailable, NotFound) as failure:
                    error = failure
                    self._report(self._current, error)
                else:
                    return
        if isinstance(error, NotFound):
            text = f"model {self._model!r} cannot be fetched: {error.message}"
            raise Unavailable(text) from error
        raise error

    def _put_last(self, place: Place, error: GearfallError) -> None:
        if self._left and isinstance(error, Unavailable) and not self._is_second_try:
            self._is_second_try = True
            self._left.append(place)

    async def read_into(self, partition: int, offset_bytes: int, destination: memoryview) -> None:
        """See `ByteSource`."""
        await self.origin.read_into(partition, offset_bytes, destination)

    async def ask(self, use: Callable[[Origin], Awaitable[T]]) -> T:
        """Return what `use` makes of the first place, from here on, at which it does not fail.

        Raises what the last one said, and at once what another place would say as well.
        """
        while True:
            place = self.place
            try:
                return await use(self.origin)
            except (Unavailable, NotFound) as error:
                await self.move_on(place, error)

    async def close(self) -> None:
        """Let go of every place."""
        for origin in self._opened:
            await origin.close()

    def _report(self, place: Place, error: GearfallError) -> None:
        extra = {"model": self._model, "place": place[0], "error": error.message}
        _log.warning("model not fetched", extra=extra)
