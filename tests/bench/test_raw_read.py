"""The raw-read bench: what it compares, and one real run on a small file."""

import json
import os
from pathlib import Path

import pytest
import xxhash

from bench.raw_read import Sample, main, prepare, summarize, write_partition
from gearfall.infra.memory.native import page_cached_bytes, read_method


def sample(target: str, round_index: int, seconds: float) -> Sample:
    return Sample(target, 10**9, round_index, seconds, {})


def test_the_ceiling_is_the_faster_raw_read_of_the_same_round():
    rows = {
        row.target: row
        for row in summarize(
            [
                sample("raw io_uring", 0, 1.0),
                sample("raw threads", 0, 2.0),
                sample("load", 0, 2.0),
                sample("load", 1, 4.0),
                sample("raw threads", 1, 1.0),
                sample("raw io_uring", 1, 4.0),
            ]
        )
    }
    assert (rows["load"].of_ceiling.low, rows["load"].of_ceiling.high) == (0.25, 0.5)
    assert rows["raw io_uring"].of_ceiling.high == 1.0
    assert rows["load"].gb_per_s.median == pytest.approx(0.375)


def test_a_partition_is_what_its_entry_says(tmp_path: Path):
    path = tmp_path / "partition-0.bin"
    entry = write_partition(path, (4 << 20) + 4096)
    content = path.read_bytes()
    assert len(content) == entry.size_bytes
    assert entry.chunk_digests() == [
        xxhash.xxh3_64_intdigest(content[: 4 << 20]),
        xxhash.xxh3_64_intdigest(content[4 << 20 :]),
    ]


def test_warm_is_wholly_cached(tmp_path: Path):
    path = tmp_path / "file"
    path.write_bytes(os.urandom(1 << 20))
    prepare(path, is_warm=True)
    assert page_cached_bytes(path) == 1 << 20


def test_a_small_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "probe").write_bytes(b"x")
    if read_method(tmp_path / "probe") != "io_uring":
        pytest.skip("no direct reads by io_uring here")
    out = tmp_path / "figures.json"
    main(["--gib", "0.01171875", "--rounds", "1", "--directory", str(tmp_path), "--out", str(out)])
    rows = json.loads(out.read_text())["rows"]
    assert [row["target"] for row in rows] == [
        "raw io_uring",
        "raw threads",
        "load",
        "load, fresh memory",
        "load, no io_uring",
        "load, 4 KiB pages",
        "load, warm",
    ]
    assert "load, warm" in capsys.readouterr().out
