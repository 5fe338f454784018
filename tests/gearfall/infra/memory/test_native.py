"""Chunked reads equal plain reads, however they are done; refusals: test_native_refusals."""

import itertools
import mmap
import os
import threading
from pathlib import Path

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from gearfall.infra.memory import native

BLOCK = 4096
FILE_BYTES = 5 * BLOCK + 123


@pytest.fixture(scope="module")
def content() -> bytes:
    return os.urandom(FILE_BYTES)


@pytest.fixture(scope="module")
def file(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("native") / "partition.bin"
    path.write_bytes(content)
    return path


def aligned_buffer(size_bytes: int) -> mmap.mmap:
    return mmap.mmap(-1, max(size_bytes, 1))


@given(
    offset=st.integers(0, FILE_BYTES),
    size=st.integers(0, FILE_BYTES),
    chunk=st.one_of(st.integers(1, 9), st.sampled_from([BLOCK, 2 * BLOCK, 2**62])),
    threads=st.integers(1, 8),
    direct=st.booleans(),
    ring=st.booleans(),
    populate_threads=st.integers(0, 2),
)
def test_read_equals_plain_read(
    file, content, offset, size, chunk, threads, direct, ring, populate_threads
):
    size = min(size, FILE_BYTES - offset)
    if chunk < BLOCK:
        size = min(size, 64)
    destination = aligned_buffer(size + 8)
    expected = content[offset : offset + size]
    expected_digests = [
        xxhash.xxh3_64_intdigest(expected[begin : begin + chunk]) for begin in range(0, size, chunk)
    ]
    progress: list[int] = []
    digests = native.read_chunks(
        file,
        offset_bytes=offset,
        size_bytes=size,
        destination=destination,
        chunk_bytes=chunk,
        threads=threads,
        direct=direct,
        ring=ring,
        populate_threads=populate_threads,
        expected=expected_digests,
        on_progress=progress.append,
    )
    assert destination[:size] == expected
    assert destination[size:] == bytes(len(destination) - size)
    assert digests == expected_digests
    assert progress == sorted(set(progress))
    assert progress[-1:] == ([len(digests)] if digests else [])


@pytest.mark.parametrize("chunk", [BLOCK, 3 * BLOCK, 3 << 20])
@pytest.mark.parametrize(("direct", "ring"), [(True, True), (True, False), (False, False)])
def test_a_read_of_many_requests(tmp_path, chunk, direct, ring):
    """More chunks and requests than are ever in flight, and a tail that no direct read takes."""
    size = (40 << 20) + 777 if chunk > 2**20 else 300 * BLOCK + 777
    content = os.urandom(1 << 16) * (size // (1 << 16) + 1)
    content = content[:size]
    path = tmp_path / "large"
    path.write_bytes(content)
    destination = aligned_buffer(size)
    native.read_chunks(
        path,
        offset_bytes=0,
        size_bytes=size,
        destination=destination,
        chunk_bytes=chunk,
        direct=direct,
        ring=ring,
    )
    assert destination[:size] == content


@pytest.mark.parametrize("step", [1, 2, 4, 100])
def test_progress_is_told_after_so_many_chunks_and_at_the_end(file, step):
    progress: list[int] = []
    native.read_chunks(
        file,
        offset_bytes=0,
        size_bytes=FILE_BYTES,
        destination=aligned_buffer(FILE_BYTES),
        chunk_bytes=BLOCK,
        on_progress=progress.append,
        progress_chunks=step,
    )
    assert progress[-1] == 6
    steps = [after - before for before, after in itertools.pairwise([0, *progress[:-1]])]
    assert all(each >= step for each in steps)


def test_the_method_is_told(file):
    assert native.read_method(file, direct=False) == "buffered"
    assert native.read_method(file, ring=False) in ("direct", "buffered")
    assert native.read_method(file) in ("io_uring", "direct", "buffered")


def test_chunks_are_taken_in_file_order_by_several_readers(file):
    first_round = threading.Barrier(3, timeout=30)
    seen: list[int] = []

    def meet(chunk: memoryview) -> int:
        if len(seen) < 3:
            seen.append(len(chunk))
            first_round.wait()
        return 0

    native.read_chunks(
        file,
        offset_bytes=0,
        size_bytes=2 * BLOCK + 5,
        destination=bytearray(FILE_BYTES),
        chunk_bytes=BLOCK,
        threads=3,
        digest=meet,
    )
    assert sorted(seen) == [5, BLOCK, BLOCK]


def test_reading_releases_the_interpreter_lock(file):
    """The readers wait for a thread that can only run while the caller holds no lock."""
    running, released = threading.Event(), threading.Event()

    def wait_for_other_thread(_: memoryview) -> int:
        running.set()
        assert released.wait(timeout=30)
        return 1

    def other_thread() -> None:
        assert running.wait(timeout=30)
        released.set()

    other = threading.Thread(target=other_thread)
    other.start()
    digests = native.read_chunks(
        file,
        offset_bytes=0,
        size_bytes=BLOCK,
        destination=bytearray(BLOCK),
        digest=wait_for_other_thread,
    )
    other.join()
    assert digests == [1]


def test_destination_of_wide_items_and_an_offset_view(file, content):
    words = memoryview(bytearray(4 * BLOCK)).cast("Q")
    native.read_chunks(file, offset_bytes=1, size_bytes=BLOCK, destination=words[8:])
    assert words.tobytes()[64 : 64 + BLOCK] == content[1 : 1 + BLOCK]


def test_the_buffer_cannot_move_during_the_read(file):
    destination = bytearray(BLOCK)

    def shrink(_: memoryview) -> int:
        with pytest.raises(BufferError):
            destination.clear()
        return 0

    native.read_chunks(
        file, offset_bytes=0, size_bytes=BLOCK, destination=destination, digest=shrink
    )


def drop_from_page_cache(path: Path) -> None:
    with path.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def test_direct_reads_leave_the_page_cache_alone(tmp_path):
    path = tmp_path / "cold"
    size = 1 << 20
    path.write_bytes(os.urandom(size))
    drop_from_page_cache(path)
    if native.page_cached_bytes(path) != 0:
        pytest.skip("this file system cannot be emptied from the page cache")
    destination = aligned_buffer(size)

    def read(*, direct: bool) -> None:
        native.read_chunks(
            path,
            offset_bytes=0,
            size_bytes=size,
            destination=destination,
            chunk_bytes=64 * BLOCK,
            direct=direct,
        )

    read(direct=True)
    cached_by_direct_bytes = native.page_cached_bytes(path)
    assert destination[:] == path.read_bytes()
    drop_from_page_cache(path)
    read(direct=False)
    assert native.page_cached_bytes(path) == size
    assert native.page_cached_bytes(path, offset_bytes=10, size_bytes=size - 20) == size - 20
    if cached_by_direct_bytes == size:
        pytest.skip("this file system has no direct reads")
    assert cached_by_direct_bytes == 0


def test_page_cache_of_an_empty_file(tmp_path):
    (tmp_path / "empty").touch()
    assert native.page_cached_bytes(tmp_path / "empty") == 0


def test_device_count_is_known_without_a_toolkit():
    assert native.cuda_device_count() >= 0
