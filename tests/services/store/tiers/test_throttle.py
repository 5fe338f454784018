"""A paced read delivers the same bytes, no faster than its rate."""

import pytest
import xxhash

from gearfall.core.errors import CorruptCheckpoint
from gearfall.infra.memory.native import read_chunks
from services.store.tiers.throttle import PacedRead

CHUNK = 4096
CONTENT = bytes(index * 7 % 251 for index in range(10 * CHUNK + 100))


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


def read_all(path, read, expected):
    destination = bytearray(len(CONTENT))
    told: list[int] = []
    with memoryview(destination) as memory:
        digests = read(
            path,
            offset_bytes=0,
            size_bytes=len(CONTENT),
            destination=memory,
            chunk_bytes=CHUNK,
            threads=1,
            direct=False,
            populate_threads=0,
            expected=expected,
            on_progress=told.append,
            progress_chunks=4,
        )
    return bytes(destination), digests, told


@pytest.fixture
def stored(tmp_path):
    path = tmp_path / "partition"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture
def expected(stored):
    return [
        xxhash.xxh3_64_intdigest(CONTENT[at : at + CHUNK]) for at in range(0, len(CONTENT), CHUNK)
    ]


def test_the_bytes_are_the_same_and_take_their_time(stored, expected):
    clock = Clock()
    paced = PacedRead(read_chunks, 20 * 3 * CHUNK, monotonic=lambda: clock.now_s, sleep=clock.sleep)
    content, digests, told = read_all(stored, paced, expected)
    assert content == CONTENT
    assert digests == expected
    assert told == [3, 6, 9, 11]
    assert clock.now_s - 100.0 == pytest.approx(len(CONTENT) / (20 * 3 * CHUNK))
    # The next load comes after it: the rate is the disk's.
    read_all(stored, paced, expected)
    assert clock.now_s - 100.0 == pytest.approx(2 * len(CONTENT) / (20 * 3 * CHUNK))


def test_a_bad_chunk_is_found_as_without_pace(stored, expected):
    clock = Clock()
    paced = PacedRead(read_chunks, CHUNK, monotonic=lambda: clock.now_s, sleep=clock.sleep)
    with pytest.raises(CorruptCheckpoint):
        read_all(stored, paced, [*expected[:5], 1, *expected[6:]])
