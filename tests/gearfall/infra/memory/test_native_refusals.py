"""What a chunked read refuses, and how it ends when something fails on the way."""

import errno
import mmap
import os
import threading
from pathlib import Path

import pytest
import xxhash

from gearfall.core.errors import CorruptCheckpoint
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
    return mmap.mmap(-1, size_bytes)


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
