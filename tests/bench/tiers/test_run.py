"""The bench of the remote tiers: its ratios, and every way once with real servers."""

import asyncio
import os
from dataclasses import replace
from pathlib import Path

import pytest

from bench.tiers.run import LOAD, TRANSPORT, Sample, summarize
from bench.tiers.servers import Places, rclone_path, serving
from bench.tiers.ways import (
    BULK,
    MEMORY,
    RAW,
    REMOTE,
    opened,
    raw_read,
    raw_tokens,
    transport,
    whole_load,
)
from gearfall.core.errors import CorruptCheckpoint, NotFound
from tests.services.store.checkpoints import many_tensors, write_checkpoint


def sample(kind: str, way: str, round_index: int, seconds: float) -> Sample:
    return Sample(kind, way, round_index, 10**9, seconds)


def test_ratios_are_taken_within_a_round():
    found = {
        (row.kind, row.way): row
        for row in summarize(
            [
                sample(TRANSPORT, RAW, 0, 1.0),
                sample(TRANSPORT, BULK, 0, 2.0),
                sample(TRANSPORT, "http", 0, 4.0),
                sample(LOAD, BULK, 0, 5.0),
                sample(LOAD, "http", 0, 10.0),
                sample(TRANSPORT, RAW, 1, 3.0),
                sample(TRANSPORT, BULK, 1, 3.0),
                sample(TRANSPORT, "http", 1, 3.0),
            ]
        )
    }
    http = found[TRANSPORT, "http"]
    assert (http.of_ceiling.low, http.of_ceiling.high) == (0.25, 1.0)
    assert (http.of_bulk.low, http.of_bulk.high) == (0.5, 1.0)
    assert http.gb_per_s.low == 0.25
    assert found[LOAD, "http"].of_bulk.median == 0.5
    assert found[LOAD, "http"].of_ceiling.median == 0.1


def test_every_way_brings_the_same_bytes_and_notices_others(tmp_path: Path):
    try:
        rclone_path()
    except NotFound as error:
        pytest.skip(error.message)
    checkpoint = tmp_path / "bucket" / "model"
    manifest = write_checkpoint(checkpoint, many_tensors(9))
    expected = (checkpoint / "partition-0.bin").read_bytes()
    [entry] = manifest.partitions
    wrong = replace(manifest, partitions=(replace(entry, checksums=("0" * 16,) * 3),))

    async def read_all(places: Places) -> None:
        for way in (*REMOTE, MEMORY):
            place = bytearray(len(expected))
            async with opened(way, places, checkpoint, manifest) as source:
                await transport(source, manifest, [memoryview(place)])
                with pytest.raises(ExceptionGroup) as found:
                    await transport(source, wrong, [memoryview(bytearray(len(expected)))])
            assert place == expected, way
            assert found.group_contains(CorruptCheckpoint)
        port, tokens = await raw_tokens(places)
        place = bytearray(len(expected))
        await asyncio.to_thread(raw_read, port, tokens, memoryview(place))
        assert place == expected
        incoming = tmp_path / "incoming"
        incoming.mkdir()
        async with opened(BULK, places, checkpoint, manifest) as source:
            [fd] = await whole_load(source, manifest, incoming)
        assert os.pread(fd, len(expected), 0) == expected
        os.close(fd)
        assert (incoming / "partition-0.bin").read_bytes() == expected

    with serving(tmp_path, checkpoint) as places:
        asyncio.run(read_all(places))
