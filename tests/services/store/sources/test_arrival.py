"""One pass from elsewhere to disk and memory: bytes, bounds, cuts, lies, cancellation."""

import asyncio
import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from gearfall.core.checkpoint.manifest import Manifest
from gearfall.core.errors import CorruptCheckpoint, GearfallError, NotFound, Unavailable
from services.store.sources.arrival import bring
from tests.services.store.checkpoints import many_tensors, write_checkpoint

DEADLINE_S = 20.0
Fault = Callable[[int], None]
POOL_FILES = ("/partition", "/memfd:gearfall")
"""What the kernel calls pool memory, on huge pages or not."""


class Source:
    """A checkpoint's own files, with what a test wants to go wrong."""

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self.contents = [
            bytearray((directory / entry.file).read_bytes()) for entry in manifest.partitions
        ]
        self.reads: list[tuple[int, int]] = []
        self.fault: Fault = lambda number: None
        self.began = asyncio.Event()
        self.gate = asyncio.Event()
        self.gate.set()

    async def read_into(self, partition: int, offset_bytes: int, destination: memoryview) -> None:
        self.reads.append((partition, offset_bytes))
        self.began.set()
        await self.gate.wait()
        self.fault(len(self.reads))
        destination[:] = self.contents[partition][offset_bytes:][: len(destination)]


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return write_checkpoint(tmp_path / "model", many_tensors(9))


@pytest.fixture
def source(tmp_path: Path, manifest: Manifest) -> Source:
    return Source(tmp_path / "model", manifest)


@pytest.fixture
def incoming(tmp_path: Path) -> Path:
    (tmp_path / "incoming").mkdir()
    return tmp_path / "incoming"


def open_files(incoming: Path) -> list[str]:
    """Name what a pass opens of this process's files: partitions on disk and in shared memory."""
    names = []
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed by another thread meanwhile
            names.append(str(link.readlink()))
    return sorted(name for name in names if name.startswith((str(incoming), *POOL_FILES)))


async def open_gate() -> None:
    pass


async def arrive(
    manifest: Manifest, source: Source, directory: Path, *, is_pooled: bool = True
) -> tuple[list[bytes], int]:
    """Bring everything; return each partition's pool content and the bytes reported."""
    reported: list[int] = []
    async with asyncio.timeout(DEADLINE_S):
        fds = await bring(
            manifest,
            source,
            directory,
            is_pooled=is_pooled,
            report=reported.append,
            gate=open_gate,
            pauses_s=(0.0, 0.0, 0.0),
        )
    contents = [os.pread(fd, os.fstat(fd).st_size, 0) for fd in fds]
    for fd in fds:
        os.close(fd)
    return contents, sum(reported)


async def test_disk_and_memory_get_the_same_bytes(
    manifest: Manifest, source: Source, incoming: Path
):
    contents, reported = await arrive(manifest, source, incoming)
    assert contents == source.contents
    assert (incoming / manifest.partitions[0].file).read_bytes() == source.contents[0]
    assert reported == manifest.size_bytes
    assert len(source.reads) == len(set(source.reads)) == 3


async def test_disk_alone(manifest: Manifest, source: Source, incoming: Path):
    contents, reported = await arrive(manifest, source, incoming, is_pooled=False)
    assert contents == []
    assert reported == manifest.size_bytes
    assert (incoming / manifest.partitions[0].file).read_bytes() == source.contents[0]


async def test_every_partition_of_a_cut_checkpoint(tmp_path: Path, incoming: Path):
    manifest = write_checkpoint(tmp_path / "cut", ranks=2)
    source = Source(tmp_path / "cut", manifest)
    contents, _ = await arrive(manifest, source, incoming)
    assert contents == source.contents


async def test_a_cut_is_taken_up_at_its_chunk(manifest: Manifest, source: Source, incoming: Path):
    def cut(number: int) -> None:
        if number == 2:
            raise Unavailable("cut")

    source.fault = cut
    contents, _ = await arrive(manifest, source, incoming)
    assert contents == source.contents
    assert len(source.reads) == 4
    assert len(set(source.reads)) == 3


async def test_what_stays_away_is_given_up(manifest: Manifest, source: Source, incoming: Path):
    def stay_away(number: int) -> None:
        raise Unavailable("cut")

    source.fault = stay_away
    with pytest.raises(Unavailable, match="cut"):
        await arrive(manifest, source, incoming)


async def test_what_asking_again_cannot_help_is_not_asked_again(
    manifest: Manifest, source: Source, incoming: Path
):
    def gone(number: int) -> None:
        raise NotFound("gone")

    source.fault = gone
    with pytest.raises(NotFound):
        await arrive(manifest, source, incoming)
    assert len(source.reads) == len(set(source.reads))


@pytest.mark.parametrize("is_pooled", [True, False])
@pytest.mark.parametrize("chunk", [0, 1, 2])
async def test_a_flipped_bit_is_named(
    manifest: Manifest, source: Source, incoming: Path, is_pooled: bool, chunk: int
):
    source.contents[0][chunk * manifest.partitions[0].chunk_bytes + 7] ^= 4
    with pytest.raises(CorruptCheckpoint, match=f"chunk {chunk} "):
        await arrive(manifest, source, incoming, is_pooled=is_pooled)


async def test_cancelled_half_way_it_lets_go_of_everything(
    manifest: Manifest, source: Source, incoming: Path
):
    source.gate.clear()
    before = open_files(incoming)
    task = asyncio.create_task(arrive(manifest, source, incoming))
    await asyncio.wait_for(source.began.wait(), DEADLINE_S)
    assert len(open_files(incoming)) >= len(before) + 2
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert open_files(incoming) == before


async def test_a_gate_that_raises_ends_the_pass(manifest: Manifest, source: Source, incoming: Path):
    async def closed() -> None:
        raise Unavailable("cancelled")

    with pytest.raises(Unavailable, match="cancelled"):
        await bring(
            manifest, source, incoming, is_pooled=False, report=lambda size: None, gate=closed
        )
    assert source.reads == []


class TwoPlaces:
    """Says that there is another place, once."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.place = 1
        self.has_more = True

    async def move_on(self, place: int, error: GearfallError) -> None:
        assert isinstance(error, Unavailable)
        if place == self.place:
            self.place, self.has_more = 2, False
            self.source.fault = lambda number: None


async def test_a_place_that_stays_away_is_left_sooner_where_there_is_another(
    tmp_path: Path, incoming: Path
):
    manifest = write_checkpoint(tmp_path / "one-chunk", many_tensors(2))
    source = Source(tmp_path / "one-chunk", manifest)
    source.fault = away
    fds = await bring(
        manifest,
        source,
        incoming,
        is_pooled=False,
        report=lambda _: None,
        gate=open_gate,
        places=TwoPlaces(source),
        pauses_s=(0.0,) * 9,
    )
    assert fds == ()
    assert len(source.reads) == 3 + 1
    assert (incoming / manifest.partitions[0].file).read_bytes() == source.contents[0]


def away(number: int) -> None:
    raise Unavailable(f"read {number}: nobody there")
