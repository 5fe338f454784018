"""Chunked reads equal plain reads, and no offset, length or file talks them out of bounds."""

import errno
import mmap
import os
import threading
from pathlib import Path

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from gearfall.core.errors import CorruptCheckpoint
from gearfall.infra import native

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


@pytest.mark.parametrize(("direct", "ring"), [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize("bad", [0, 3, 5])
def test_an_unexpected_digest_names_its_chunk(file, content, bad, direct, ring):
    digests = [
        xxhash.xxh3_64_intdigest(content[begin : begin + BLOCK])
        for begin in range(0, FILE_BYTES, BLOCK)
    ]
    wrong = [digest ^ (index == bad) for index, digest in enumerate(digests)]
    with pytest.raises(CorruptCheckpoint, match=rf"chunk {bad} .*{digests[bad]:016x}, not"):
        native.read_chunks(
            file,
            offset_bytes=0,
            size_bytes=FILE_BYTES,
            destination=aligned_buffer(FILE_BYTES),
            chunk_bytes=BLOCK,
            expected=wrong,
            direct=direct,
            ring=ring,
        )


@pytest.mark.parametrize("count", [1, 5, 7])
def test_not_one_expected_digest_a_chunk(file, count):
    with pytest.raises(ValueError, match="one digest for each of the 6 chunks"):
        native.read_chunks(
            file,
            offset_bytes=0,
            size_bytes=FILE_BYTES,
            destination=bytearray(FILE_BYTES),
            chunk_bytes=BLOCK,
            expected=[0] * count,
        )


@pytest.mark.parametrize(("direct", "ring"), [(True, True), (True, False), (False, False)])
def test_progress_that_raises_cancels_the_read(tmp_path, direct, ring):
    """Digests wait for the cancellation, all but one thread's until it had the first chunk: little
    is ever digested, in whichever order chunks come."""
    path = tmp_path / "long"
    path.write_bytes(b"first" + os.urandom(512 * BLOCK - 5))
    digested: list[int] = []
    came_first, cancelled, is_one_free = threading.Event(), threading.Event(), threading.Lock()

    def digest(chunk: memoryview) -> int:
        digested.append(len(chunk))
        if bytes(chunk[:5]) == b"first":
            came_first.set()
        elif came_first.is_set() or is_one_free.acquire(blocking=False):
            assert cancelled.wait(timeout=30)
        return 0

    def give_up(verified: int) -> None:
        threading.Timer(0, cancelled.set).start()
        raise KeyError(verified)

    destination = aligned_buffer(512 * BLOCK)
    with pytest.raises(KeyError):
        native.read_chunks(
            path,
            offset_bytes=0,
            size_bytes=512 * BLOCK,
            destination=destination,
            chunk_bytes=BLOCK,
            threads=2,
            direct=direct,
            ring=ring,
            digest=digest,
            on_progress=give_up,
        )
    assert len(digested) < 512
    destination.close()  # nobody holds on to it


@pytest.mark.parametrize("error", [CorruptCheckpoint, KeyError])
def test_the_destination_is_let_go_of_after_an_error(file, error):
    def digest(chunk: memoryview) -> int:
        if error is KeyError:
            raise KeyError
        return 1

    destination = aligned_buffer(FILE_BYTES)
    with pytest.raises(error):
        native.read_chunks(
            file,
            offset_bytes=0,
            size_bytes=FILE_BYTES,
            destination=destination,
            digest=digest,
            expected=[0],
        )
    destination.close()


@pytest.mark.parametrize(("direct", "ring"), [(True, True), (True, False), (False, False)])
def test_a_destination_without_memory_behind_it(file, tmp_path, direct, ring):
    """The device refuses the read, and so does the buffered one that is tried in its place."""
    backing = tmp_path / "backing"
    backing.write_bytes(bytes(4 * BLOCK))
    with backing.open("r+b") as opened, mmap.mmap(opened.fileno(), 4 * BLOCK) as destination:
        opened.truncate(BLOCK)
        with pytest.raises(OSError, match="Bad address") as caught:
            native.read_chunks(
                file,
                offset_bytes=0,
                size_bytes=4 * BLOCK,
                destination=destination,
                chunk_bytes=2 * BLOCK,
                threads=1,
                populate_threads=1,
                direct=direct,
                ring=ring,
            )
    assert caught.value.errno == errno.EFAULT


def test_the_method_is_told(file):
    assert native.read_method(file, direct=False) == "buffered"
    assert native.read_method(file, ring=False) in ("direct", "buffered")
    assert native.read_method(file) in ("io_uring", "direct", "buffered")


@pytest.mark.parametrize(
    ("offset", "size"),
    [
        (0, FILE_BYTES + 1),
        (1, FILE_BYTES),
        (FILE_BYTES, 1),
        (FILE_BYTES + 1, 0),
        (2**60, 1),
        (2**63 - 1, 1),
        (2**63 - BLOCK, BLOCK),
        (2**64, 1),
        (2**64 - 1, 2),
        (-1, 1),
        (-(2**63), 1),
        (-(2**70), 1),
        (0, -1),
        (BLOCK, -BLOCK),
        (0, -(2**63)),
    ],
)
@pytest.mark.parametrize("direct", [False, True])
def test_range_outside_the_file_is_a_corrupt_checkpoint(file, offset, size, direct):
    destination = aligned_buffer(2 * FILE_BYTES)
    with pytest.raises(CorruptCheckpoint, match="lie outside"):
        native.read_chunks(
            file, offset_bytes=offset, size_bytes=size, destination=destination, direct=direct
        )
    assert bytes(destination) == bytes(2 * FILE_BYTES)
    with pytest.raises(CorruptCheckpoint, match="lie outside"):
        native.page_cached_bytes(file, offset_bytes=offset, size_bytes=size)


@pytest.mark.parametrize("size", [FILE_BYTES, 2**62, 2**70])
def test_destination_too_small(file, size):
    destination = bytearray(FILE_BYTES - 1)
    with pytest.raises(ValueError, match="destination holds"):
        native.read_chunks(file, offset_bytes=0, size_bytes=size, destination=destination)
    assert destination == bytes(FILE_BYTES - 1)


@pytest.mark.parametrize(
    "arguments",
    [
        {"chunk_bytes": 0},
        {"chunk_bytes": -1},
        {"threads": 0},
        {"threads": 65},
        {"populate_threads": -1},
        {"populate_threads": 65},
    ],
)
def test_senseless_arguments(file, arguments):
    with pytest.raises(ValueError, match="must be"):
        native.read_chunks(
            file, offset_bytes=0, size_bytes=1, destination=bytearray(1), **arguments
        )


def test_read_only_destination(file):
    with pytest.raises(BufferError):
        native.read_chunks(file, offset_bytes=0, size_bytes=1, destination=b"x")


def test_missing_file(tmp_path):
    path = tmp_path / "absent"
    with pytest.raises(FileNotFoundError) as caught:
        native.read_chunks(path, offset_bytes=0, size_bytes=0, destination=bytearray(1))
    assert caught.value.errno == errno.ENOENT
    assert caught.value.filename == str(path)


def test_directory_pipe_and_nul_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", str(tmp_path) + "\0"):
        with pytest.raises(ValueError, match=r"not a regular file|NUL"):
            native.read_chunks(path, offset_bytes=0, size_bytes=0, destination=bytearray(1))


@pytest.mark.parametrize(("direct", "ring"), [(True, True), (True, False), (False, False)])
def test_file_that_shrinks_during_the_read(tmp_path, direct, ring):
    """The first digest cuts the file while at most a window of chunks is read."""
    path = tmp_path / "shrinking"
    path.write_bytes(os.urandom(64 * BLOCK))

    def truncate(_: memoryview) -> int:
        os.truncate(path, 2 * BLOCK)
        return 0

    with pytest.raises(CorruptCheckpoint, match="became shorter"):
        native.read_chunks(
            path,
            offset_bytes=0,
            size_bytes=64 * BLOCK,
            destination=aligned_buffer(64 * BLOCK),
            chunk_bytes=BLOCK,
            threads=1,
            direct=direct,
            ring=ring,
            digest=truncate,
        )


def test_failing_digest_ends_the_read(file):
    calls = []

    def fail(chunk: memoryview) -> int:
        calls.append(len(chunk))
        raise KeyError("digest")

    with pytest.raises(KeyError, match="digest"):
        native.read_chunks(
            file,
            offset_bytes=0,
            size_bytes=FILE_BYTES,
            destination=bytearray(FILE_BYTES),
            chunk_bytes=1,
            threads=2,
            digest=fail,
        )
    assert 1 <= len(calls) <= 2


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
