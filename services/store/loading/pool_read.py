"""Reads a model from SSD into pool memory, in a thread, until told to give up."""

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from gearfall.infra.memory.native import PoolFile
from services.store.loading.filling import Filling
from services.store.loading.load import GivenUp
from services.store.tiers.pool import Resident
from services.store.tiers.pool_memory import Allocate, ReadChunks, fill_partition
from services.store.tiers.stored_model import StoredModel


async def read_model(
    stored: StoredModel,
    read: ReadChunks,
    report: Callable[[int], None],
    gives_up: threading.Event,
    *,
    begin: Callable[[Filling], None] = lambda _: None,
    allocate: Allocate = PoolFile,
) -> Resident:
    """Read and verify every partition; the descriptors are the caller's.

    In the loop's thread `begin` is given the memory, its end being the caller's to say, while the
    first bytes are read, and `report` is told verified bytes. Raises GivenUp soon after
    `gives_up` is set, CorruptCheckpoint for a bad chunk, OSError when the disk fails. Cancelled, it
    returns once its thread has let go of the memory.
    """
    work = _Read(stored, read, report, gives_up, begin, allocate)
    reading = asyncio.ensure_future(asyncio.to_thread(work.run))
    try:
        fds = await asyncio.shield(reading)
    except asyncio.CancelledError:
        gives_up.set()
        await asyncio.wait((reading,))
        if reading.exception() is None:
            _close(reading.result())
        raise
    sizes = tuple(partition.size_bytes for partition in stored.manifest.partitions)
    return Resident(stored.name, stored.digest, stored.manifest_json, fds, sizes)


class _Read:
    """One read's way through the partitions, in a thread of its own."""

    def __init__(  # noqa: PLR0917
        self,
        stored: StoredModel,
        read: ReadChunks,
        report: Callable[[int], None],
        gives_up: threading.Event,
        begin: Callable[[Filling], None],
        allocate: Allocate,
    ) -> None:
        self._stored = stored
        self._read = read
        self._report = report
        self._gives_up = gives_up
        self._begin = begin
        self._allocate = allocate
        self._loop = asyncio.get_running_loop()
        self._verified_bytes = [0] * len(stored.manifest.partitions)
        self._filling: Filling | None = None

    def run(self) -> tuple[int, ...]:
        """Fill and seal everything; return the sealed descriptors."""
        with contextlib.ExitStack() as stack:
            files = [
                stack.enter_context(self._allocate(partition.size_bytes))
                for partition in self._stored.manifest.partitions
            ]
            # Memory that was kept ready may have a tail to cut before others see it: meanwhile the
            # disk is at work. Ended before the files are closed, as before the load's end.
            beside = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="hand-out"))
            handed_out = beside.submit(self._hand_out, files)
            for index, file in enumerate(files):
                self._fill(index, file)
            handed_out.result()
            return _seal(files)

    def _hand_out(self, files: list[PoolFile]) -> None:
        stored = self._stored
        filling = Filling.over(stored.name, stored.digest, stored.manifest_json, files)
        self._loop.call_soon_threadsafe(self._begin_filling, filling)

    def _fill(self, index: int, file: PoolFile) -> None:
        done_bytes = 0

        def report_verified(size_bytes: int) -> None:
            nonlocal done_bytes
            if self._gives_up.is_set():
                raise GivenUp
            done_bytes += size_bytes
            self._loop.call_soon_threadsafe(self._advance, index, done_bytes, size_bytes)

        stored = self._stored
        partition, path = stored.manifest.partitions[index], stored.partition_path(index)
        fill_partition(path, partition, file, self._read, report_verified)

    def _begin_filling(self, filling: Filling) -> None:
        for index, verified_bytes in enumerate(self._verified_bytes):
            filling.advance(index, verified_bytes)
        self._filling = filling
        self._begin(filling)

    def _advance(self, index: int, verified_bytes: int, size_bytes: int) -> None:
        self._report(size_bytes)
        self._verified_bytes[index] = verified_bytes
        if self._filling is not None:
            self._filling.advance(index, verified_bytes)


def _seal(files: list[PoolFile]) -> tuple[int, ...]:
    fds: list[int] = []
    try:
        fds.extend(file.seal() for file in files)
    except BaseException:
        _close(fds)
        raise
    return tuple(fds)


def _close(fds: "tuple[int, ...] | list[int]") -> None:
    for fd in fds:
        os.close(fd)
