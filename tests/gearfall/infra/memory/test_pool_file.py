"""Pool memory can be filled until it is sealed, and never again by anybody."""

import errno
import mmap
import os
from pathlib import Path

import pytest

from gearfall import _cuda_ext
from gearfall.infra.memory.native import PoolFile, StopSign

SIZE_BYTES = (2 << 20) + 4096
MIB = 2**20


def allocated_bytes(file: PoolFile) -> int:
    return os.fstat(file.fileno()).st_blocks * 512


@pytest.fixture
def sealed() -> int:
    with PoolFile(SIZE_BYTES) as file:
        with mmap.mmap(file.fileno(), SIZE_BYTES) as mapping:
            mapping[:4] = b"head"
            mapping[-4:] = b"tail"
        return file.seal()


def test_what_was_written_is_read(sealed):
    with mmap.mmap(sealed, SIZE_BYTES, mmap.MAP_PRIVATE) as mapping:
        assert mapping[:4] == b"head"
        assert mapping[4:-4] == bytes(SIZE_BYTES - 8)
        assert mapping[-4:] == b"tail"
    assert os.fstat(sealed).st_size == SIZE_BYTES
    os.close(sealed)


def test_nobody_changes_it(sealed):
    for change in (
        lambda: os.pwrite(sealed, b"x", 0),
        lambda: os.ftruncate(sealed, 1),
        lambda: os.ftruncate(sealed, 2 * SIZE_BYTES),
        lambda: mmap.mmap(sealed, SIZE_BYTES),
    ):
        with pytest.raises(OSError, match=r"not permitted|Permission|Bad file|Invalid"):
            change()
    os.close(sealed)


def test_it_cannot_be_opened_anew_for_writing(sealed):
    def open_and_write() -> None:
        with Path(f"/proc/self/fd/{sealed}").open("r+b", buffering=0) as again:
            again.write(b"x")

    with pytest.raises(OSError, match=r"Read-only|not permitted|Permission"):
        open_and_write()
    os.close(sealed)


def test_private_writes_stay_private(sealed):
    with mmap.mmap(sealed, SIZE_BYTES, mmap.MAP_PRIVATE) as mine:
        mine[:4] = b"mine"
        with mmap.mmap(sealed, SIZE_BYTES, mmap.MAP_PRIVATE) as other:
            assert other[:4] == b"head"
    os.close(sealed)


def test_it_outlives_the_object_and_the_descriptor(sealed):
    mapping = mmap.mmap(sealed, SIZE_BYTES, mmap.MAP_PRIVATE)
    os.close(sealed)
    assert mapping[-4:] == b"tail"
    mapping.close()


def test_a_writable_mapping_forbids_sealing():
    with PoolFile(4096) as file:
        mapping = mmap.mmap(file.fileno(), 4096)
        with pytest.raises(OSError, match="busy"):
            file.seal()
        mapping.close()


def test_what_is_written_through_its_own_mapping_is_read():
    with PoolFile(SIZE_BYTES) as file:
        with file.memory() as memory:
            memory[:4], memory[-4:] = b"head", b"tail"
        sealed = file.seal()
    assert os.pread(sealed, 4, 0) + os.pread(sealed, 4, SIZE_BYTES - 4) == b"headtail"
    os.close(sealed)


def test_it_is_not_sealed_while_its_memory_is_viewed():
    with PoolFile(4096) as file:
        with file.memory(), pytest.raises(BufferError):
            file.seal()
        os.close(file.seal())


def test_it_is_faulted_in_step_by_step_from_the_front():
    with PoolFile(5 * MIB) as file:
        assert allocated_bytes(file) == file.faulted_bytes == 0
        file.fault_in(2 * MIB)
        assert file.faulted_bytes == 2 * MIB
        assert 2 * MIB <= allocated_bytes(file) < 5 * MIB
        for _ in range(3):
            file.fault_in(2 * MIB)
        assert file.faulted_bytes == file.size_bytes == allocated_bytes(file) == 5 * MIB


def test_a_stop_sign_ends_the_faulting_in():
    stop = StopSign()
    stop.show()
    with PoolFile(5 * MIB) as file:
        file.fault_in(5 * MIB, stop)
        assert file.faulted_bytes == allocated_bytes(file) == 0
        file.fault_in(5 * MIB)
        assert file.faulted_bytes == 5 * MIB


@pytest.mark.parametrize("size_bytes", [4 * MIB, 3 * MIB + 4097, 1])
def test_cut_it_frees_its_tail_and_keeps_its_front(size_bytes):
    with PoolFile(6 * MIB) as file:
        file.fault_in(6 * MIB)
        with file.memory() as memory:
            memory[:] = b"x" * len(memory)
        file.resize(size_bytes)
        assert file.faulted_bytes == file.size_bytes == size_bytes
        assert allocated_bytes(file) == -(-size_bytes // 4096) * 4096
        with file.memory() as memory:
            assert memory == b"x" * size_bytes
        sealed = file.seal()
    assert os.fstat(sealed).st_size == size_bytes
    os.close(sealed)


@pytest.mark.parametrize("size_bytes", [4 * MIB, 3 * MIB + 4097, 1])
def test_shortened_it_is_cut_while_its_front_is_in_use(size_bytes):
    with PoolFile(6 * MIB) as file:
        file.fault_in(6 * MIB)
        file.shorten(size_bytes)
        assert file.faulted_bytes == file.size_bytes == size_bytes
        assert allocated_bytes(file) == 6 * MIB
        with file.memory() as memory:
            assert len(memory) == size_bytes
            file.cut()
            memory[:] = b"x" * size_bytes
        assert allocated_bytes(file) == -(-size_bytes // 4096) * 4096


@pytest.mark.parametrize("give", ["open_reader", "seal"])
def test_whoever_is_given_a_descriptor_finds_it_cut(give):
    with PoolFile(6 * MIB) as file:
        file.fault_in(6 * MIB)
        file.shorten(MIB)
        fd = getattr(file, give)()
        assert os.fstat(fd).st_size == MIB
        os.close(fd)


def test_shortened_it_can_be_resized():
    with PoolFile(6 * MIB) as file:
        file.fault_in(6 * MIB)
        file.shorten(MIB)
        file.resize(2 * MIB)
        file.fault_in(2 * MIB)
        assert allocated_bytes(file) == file.faulted_bytes == file.size_bytes == 2 * MIB


@pytest.mark.parametrize("size_bytes", [MIB, 3 * MIB, 9 * MIB])
def test_resized_before_all_of_it_is_there(size_bytes):
    with PoolFile(8 * MIB) as file:
        file.fault_in(2 * MIB)
        file.resize(size_bytes)
        assert file.faulted_bytes == min(size_bytes, 2 * MIB)
        file.fault_in(size_bytes)
        assert allocated_bytes(file) == file.faulted_bytes == size_bytes


def test_lengthened_it_holds_zeros_that_are_not_there_yet():
    with PoolFile(MIB) as file:
        file.fault_in(MIB)
        with file.memory() as memory:
            memory[:] = b"x" * MIB
        file.resize(4 * MIB)
        assert (file.faulted_bytes, file.size_bytes) == (MIB, 4 * MIB)
        assert allocated_bytes(file) < 4 * MIB
        file.fault_in(4 * MIB)
        assert allocated_bytes(file) == 4 * MIB
        with file.memory() as memory:
            assert memory == b"x" * MIB + bytes(3 * MIB)


def test_memory_that_is_not_to_be_had_is_an_error_and_no_signal():
    with PoolFile(MIB) as file, file.memory() as memory:
        os.ftruncate(file.fileno(), 4096)
        with pytest.raises(OSError, match="madvise") as refused:
            _cuda_ext.fault_in(memory, StopSign())
    assert refused.value.errno == errno.ENOSPC


def test_sealed_or_closed_it_is_used_up():
    file = PoolFile(4096)
    os.close(file.seal())
    with pytest.raises(ValueError, match="sealed"):
        file.seal()
    file.close()
    file.close()
    with pytest.raises(ValueError, match="closed"):
        file.fileno()


@pytest.mark.parametrize("size", [0, -1, -(2**70)])
def test_senseless_sizes(size):
    with pytest.raises(ValueError, match="less than one byte"):
        PoolFile(size)
    with PoolFile(1) as file, pytest.raises(ValueError, match="less than one byte"):
        file.resize(size)


def test_descriptors_are_given_back():
    before = sorted(Path("/proc/self/fd").iterdir())
    for _ in range(3):
        with PoolFile(4096):
            pass
        with PoolFile(4096) as file:
            os.close(file.seal())
        with pytest.raises(ValueError, match="less than"):
            PoolFile(0)
    assert sorted(Path("/proc/self/fd").iterdir()) == before


def test_it_is_seen_in_no_mount_table():
    with PoolFile(4096):
        mounts = Path("/proc/self/mountinfo").read_text()
    assert "gearfall" not in mounts
