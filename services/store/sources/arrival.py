"""Brings a checkpoint's bytes from elsewhere to SSD and, in the same pass, into pool memory.

                     source                  memory                    disk
    for each chunk:  read_into ------------> verify (once) ----------> write
    _IN_FLIGHT at a time, in load order

A chunk's whole way is one worker's turn, so that a slow step holds up those before it: at most
`_IN_FLIGHT` chunks are between source and disk, and the slowest tier alone sets the time. A cut
connection is taken up again at the part of the chunk that it cut, at the next place that has the
checkpoint if this one stays away.
"""

import asyncio
import contextlib
import mmap
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import xxhash

from gearfall.checkpoint.directory import disk_errors
from gearfall.core.checkpoint.manifest import Manifest, PartitionEntry
from gearfall.core.errors import CorruptCheckpoint, GearfallError, NotFound, Unavailable
from gearfall.infra.memory.native import PoolFile
from services.store.tiers.partition_file import PartitionFile
from services.store.tiers.pool_memory import Allocate
from services.store.tiers.verified_front import VerifiedFront

_IN_FLIGHT = 12
"""Requests a remote store is given at once; with parts of 4 MiB, 48 MiB beyond the pool."""
_PART_BYTES = 4 * 2**20
_THREADS = 4
RETRY_PAUSES_S = (0.1, 0.4, 1.6, 6.4)
"""Between the attempts at one part; after the last the load fails."""
_PAUSES_BEFORE_NEXT = 2
"""So many of them where another place has the checkpoint too."""

Report = Callable[[int], None]
"""Told the bytes of each chunk that is verified and written."""
Gate = Callable[[], Awaitable[None]]
"""Awaited before each chunk; may hold the load up, or raise to give up."""
Advance = Callable[[int, int], None]
"""Told a partition and how many of its bytes are verified in pool memory, from its front on."""
HandOut = Callable[[Sequence[PoolFile]], Advance]
"""Given the pool memory, one file a partition, before the first byte comes."""


class ByteSource(Protocol):
    """Where the bytes of one version of one checkpoint can be had."""

    async def read_into(self, partition: int, offset_bytes: int, destination: memoryview) -> None:
        """Fill `destination` from that place in a partition.

        Raises Unavailable when asking again may help, any other GearfallError when not. When it
        raises, or is cancelled, nothing writes to `destination` any more.
        """
        ...


class Places(Protocol):
    """Where else the bytes can be had."""

    @property
    def place(self) -> int:
        """Number of the place that is asked now."""
        ...

    @property
    def has_more(self) -> bool:
        """Whether there is another one to move on to."""
        ...

    async def move_on(self, place: int, error: GearfallError) -> None:
        """Have the next place asked from now on, as `place` failed with `error`.

        Raises Unavailable when there is none.
        """
        ...


@dataclass(frozen=True, slots=True)
class _Chunk:
    partition: int
    index: int
    offset_bytes: int
    size_bytes: int
    digest: int


async def bring(
    manifest: Manifest,
    source: ByteSource,
    directory: Path,
    *,
    is_pooled: bool,
    report: Report,
    gate: Gate,
    allocate: Allocate = PoolFile,
    hand_out: HandOut = lambda _: lambda _partition, _size_bytes: None,
    places: Places | None = None,
    pauses_s: Sequence[float] = RETRY_PAUSES_S,
) -> tuple[int, ...]:
    """Write every partition into `directory`, synced; with `is_pooled` into pool memory as well.

    Returns one sealed descriptor for each partition if pooled, the caller's from here, else none;
    `allocate` makes their memory, and whoever `hand_out` gives it to may read what is verified.
    Where there are more `places`, one that stays away or has nothing is left for the next; what has
    come stays.
    Raises CorruptCheckpoint for a chunk that is not what the manifest says, Overloaded when the
    disk is full, Unavailable when the source stays away. The files are the caller's to remove.
    """
    with contextlib.ExitStack() as pool_files, disk_errors():
        pooled = [
            pool_files.enter_context(await asyncio.to_thread(allocate, partition.size_bytes))
            for partition in (manifest.partitions if is_pooled else ())
        ]
        for file in pooled:
            await asyncio.to_thread(file.cut)
        advance = hand_out(pooled) if is_pooled else None
        with contextlib.ExitStack() as stack:
            memories = [stack.enter_context(file.memory()) for file in pooled]
            files = [
                stack.enter_context(PartitionFile(directory / entry.file, entry.size_bytes))
                for entry in manifest.partitions
            ]
            await _Pass(
                manifest,
                source,
                memories=memories,
                files=files,
                report=report,
                advance=advance,
                gate=gate,
                places=places,
                pauses_s=pauses_s,
            ).run()
            await asyncio.to_thread(_finish, files)
        return tuple(file.seal() for file in pooled)


class _Pass:
    """One pass over all chunks."""

    def __init__(
        self,
        manifest: Manifest,
        source: ByteSource,
        *,
        memories: Sequence[memoryview],
        files: Sequence[PartitionFile],
        report: Report,
        advance: Advance | None,
        gate: Gate,
        places: Places | None,
        pauses_s: Sequence[float],
    ) -> None:
        self._manifest = manifest
        self._source = source
        self._memories = memories
        self._files = files
        self._report = report
        self._advance = advance
        self._gate = gate
        self._places = places
        self._pauses_s = pauses_s
        self._chunks = _chunks(manifest)
        self._fronts = [VerifiedFront(_chunk_sizes(entry)) for entry in manifest.partitions]
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="arrival")

    async def run(self) -> None:
        try:
            async with asyncio.TaskGroup() as workers:
                for _ in range(_IN_FLIGHT):
                    workers.create_task(self._work())
        except BaseExceptionGroup as errors:
            # The first is what went wrong; the rest followed from it.
            raise _first(errors) from None
        finally:
            # Whoever frees the memory next must find nobody writing to it.
            self._threads.shutdown(wait=True, cancel_futures=True)

    async def _work(self) -> None:
        with contextlib.ExitStack() as stack:
            scratch = None if self._memories else _scratch(stack, self._largest_bytes())
            for chunk in self._chunks:
                await self._gate()
                with self._place(chunk, scratch) as place:
                    await self._fetch(chunk, place)
                    await self._in_thread(chunk, place)
                self._report(chunk.size_bytes)
                self._note_verified(chunk)

    def _note_verified(self, chunk: _Chunk) -> None:
        front = self._fronts[chunk.partition]
        if front.add(chunk.index) and self._advance is not None:
            self._advance(chunk.partition, front.size_bytes)

    def _place(self, chunk: _Chunk, scratch: memoryview | None) -> memoryview:
        if scratch is not None:
            return scratch[: chunk.size_bytes]
        return self._memories[chunk.partition][chunk.offset_bytes :][: chunk.size_bytes]

    def _largest_bytes(self) -> int:
        entries = self._manifest.partitions
        return max(min(entry.chunk_bytes, entry.size_bytes) for entry in entries)

    async def _fetch(self, chunk: _Chunk, place: memoryview) -> None:
        for start in range(0, chunk.size_bytes, _PART_BYTES):
            with place[start : start + _PART_BYTES] as part:
                await self._fetch_part(chunk.partition, chunk.offset_bytes + start, part)

    async def _fetch_part(self, partition: int, offset_bytes: int, part: memoryview) -> None:
        while True:
            place = 0 if self._places is None else self._places.place
            try:
                await self._ask(partition, offset_bytes, part)
            except (Unavailable, NotFound) as error:
                if self._places is None:
                    raise
                await self._places.move_on(place, error)
            else:
                return

    async def _ask(self, partition: int, offset_bytes: int, part: memoryview) -> None:
        has_more = self._places is not None and self._places.has_more
        for pause_s in self._pauses_s[: _PAUSES_BEFORE_NEXT if has_more else None]:
            try:
                await self._source.read_into(partition, offset_bytes, part)
            except Unavailable:
                await asyncio.sleep(pause_s)
            else:
                return
        await self._source.read_into(partition, offset_bytes, part)

    async def _in_thread(self, chunk: _Chunk, place: memoryview) -> None:
        loop = asyncio.get_running_loop()
        work = loop.run_in_executor(self._threads, self._verify_and_write, chunk, place)
        try:
            await asyncio.shield(work)
        except asyncio.CancelledError:
            # Short, and it still reads the memory.
            with contextlib.suppress(Exception):
                await work
            raise

    def _verify_and_write(self, chunk: _Chunk, place: memoryview) -> None:
        found = xxhash.xxh3_64_intdigest(place)
        if found != chunk.digest:
            name = self._manifest.partitions[chunk.partition].file
            raise CorruptCheckpoint(
                f"{name}: chunk {chunk.index} came with other bytes than the manifest says "
                f"(xxh3_64 {found:016x}, not {chunk.digest:016x})"
            )
        self._files[chunk.partition].write(chunk.offset_bytes, place)


def _chunks(manifest: Manifest) -> Iterator[_Chunk]:
    for number, entry in enumerate(manifest.partitions):
        sizes = zip(entry.chunk_digests(), _chunk_sizes(entry), strict=True)
        for index, (digest, size) in enumerate(sizes):
            yield _Chunk(number, index, index * entry.chunk_bytes, size, digest)


def _chunk_sizes(entry: PartitionEntry) -> Sequence[int]:
    starts = range(0, entry.size_bytes, entry.chunk_bytes)
    return [min(entry.chunk_bytes, entry.size_bytes - start) for start in starts]


def _scratch(stack: contextlib.ExitStack, size_bytes: int) -> memoryview:
    """Memory on pages of its own, as direct writes need it."""
    return stack.enter_context(memoryview(stack.enter_context(mmap.mmap(-1, size_bytes))))


def _finish(files: Sequence[PartitionFile]) -> None:
    for file in files:
        file.finish()


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    found: BaseException = errors
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    return found
