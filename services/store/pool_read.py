"""Reads a model from SSD into pool memory, in a thread, until told to give up."""

import asyncio
import os
import threading
from collections.abc import Callable

from services.store.pool import Resident
from services.store.pool_memory import ReadChunks, load_partition
from services.store.stored_model import StoredModel


class GivenUp(Exception):  # noqa: N818 - not an error: another load goes first
    """The read ended because it was told to."""


async def read_model(
    stored: StoredModel,
    read: ReadChunks,
    report: Callable[[int], None],
    gives_up: threading.Event,
) -> Resident:
    """Read and verify every partition; the descriptors are the caller's.

    `report` is told verified bytes in the loop's thread. Raises GivenUp soon after `gives_up` is
    set, CorruptCheckpoint for a bad chunk, OSError when the disk fails. Cancelled, it returns once
    its thread has let go of the memory.
    """
    loop = asyncio.get_running_loop()

    def report_verified(size_bytes: int) -> None:
        if gives_up.is_set():
            raise GivenUp
        loop.call_soon_threadsafe(report, size_bytes)

    reading = asyncio.ensure_future(
        asyncio.to_thread(_read_partitions, stored, read, report_verified)
    )
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


def _read_partitions(
    stored: StoredModel, read: ReadChunks, report: Callable[[int], None]
) -> tuple[int, ...]:
    fds: list[int] = []
    try:
        for index, partition in enumerate(stored.manifest.partitions):
            fds.append(load_partition(stored.partition_path(index), partition, read, report))
    except BaseException:
        _close(fds)
        raise
    return tuple(fds)


def _close(fds: "tuple[int, ...] | list[int]") -> None:
    for fd in fds:
        os.close(fd)
