"""Bytes reach a device, verified, and everything is given back.

On a machine with a CUDA device this runs on it (`make test-gpu`). On every machine
tests/cuda_ext/test_driver_double.py runs it again over a driver of our own.
"""

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from mmap import mmap
from pathlib import Path

import pytest
import xxhash

from gearfall.core.errors import CorruptCheckpoint, Unavailable
from gearfall.infra.memory import native
from gearfall.infra.memory.device import DeviceBuffer

BLOCK = 4096
CHUNK_BYTES = 16 * BLOCK
SIZE_BYTES = 10 * CHUNK_BYTES + 100
PINNED_SLICE_BYTES = 64 << 20
GPU = pytest.mark.gpu

pytestmark = pytest.mark.skipif(
    not native.cuda_device_count(), reason="there is no CUDA device: nothing was run on one"
)


@pytest.fixture(autouse=True)
def _all_is_given_back() -> Iterator[None]:
    yield
    held = _double_entry("double_held")
    assert held is None or held() == 0


@pytest.fixture
def refuse() -> Iterator[Callable[[str, int], None]]:
    entry = _double_entry("double_refuse")
    if entry is None:
        pytest.skip("a real driver does not fail on demand")
    refused: list[bytes] = []

    def refuse(name: str, code: int) -> None:
        refused.append(name.encode())
        entry(refused[-1], code)

    yield refuse
    for name in refused:
        entry(name, 0)


def _double_entry(name: str) -> Callable[..., int] | None:
    """Return a function of the driver's double; None where the driver is a real one."""
    return getattr(ctypes.CDLL("libcuda.so.1"), name, None)


@pytest.fixture(scope="module")
def content() -> bytes:
    return os.urandom(SIZE_BYTES)


@pytest.fixture(scope="module")
def file(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("device") / "partition.bin"
    path.write_bytes(content)
    return path


def read_to_device(path: Path, buffer: DeviceBuffer, size: int = SIZE_BYTES, **arguments) -> None:
    with mmap(-1, size) as mapping, memoryview(mapping) as memory:
        native.read_chunks(
            path,
            offset_bytes=0,
            size_bytes=size,
            destination=memory,
            chunk_bytes=CHUNK_BYTES,
            device_buffer=buffer.native,
            **arguments,
        )


@GPU
@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("ring", [False, True])
def test_verified_chunks_arrive(file, content, direct, ring):
    buffer = DeviceBuffer(0, SIZE_BYTES + 7)
    expected = [
        xxhash.xxh3_64_intdigest(content[begin : begin + CHUNK_BYTES])
        for begin in range(0, SIZE_BYTES, CHUNK_BYTES)
    ]
    read_to_device(file, buffer, direct=direct, ring=ring, expected=expected)
    assert buffer.read(0, SIZE_BYTES) == content


@GPU
def test_a_corrupt_chunk_ends_the_load_and_unpins(file):
    buffer = DeviceBuffer(0, SIZE_BYTES)
    with pytest.raises(CorruptCheckpoint, match="chunk 0 "):
        read_to_device(file, buffer, threads=1, expected=[0] * 11)


@GPU
def test_a_cancelled_load_unpins(file):
    buffer = DeviceBuffer(0, SIZE_BYTES)

    def give_up(_: int) -> None:
        raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        read_to_device(file, buffer, on_progress=give_up)


@GPU
def test_a_buffer_too_small_for_the_read(file):
    buffer = DeviceBuffer(0, SIZE_BYTES - 1)
    with pytest.raises(ValueError, match="device buffer holds"):
        read_to_device(file, buffer)


@GPU
def test_resident_memory_is_copied_across_slices():
    size = PINNED_SLICE_BYTES + 3 * BLOCK
    buffer = DeviceBuffer(0, size)
    with mmap(-1, size) as mapping:
        mapping[:BLOCK] = b"a" * BLOCK
        mapping[PINNED_SLICE_BYTES - BLOCK : PINNED_SLICE_BYTES + BLOCK] = b"b" * (2 * BLOCK)
        mapping[-1:] = b"c"
        with memoryview(mapping) as memory:
            pinned_bytes = buffer.copy_from(memory)
        for begin in (0, PINNED_SLICE_BYTES - 2 * BLOCK, size - BLOCK):
            end = min(begin + 4 * BLOCK, size)
            assert buffer.read(begin, end - begin) == mapping[begin:end]
    assert pinned_bytes in (0, size)


@GPU
def test_ranges_outside_the_buffer():
    buffer = DeviceBuffer(0, BLOCK)
    for offset, size in ((0, BLOCK + 1), (BLOCK, 1), (-1, 1), (0, -1), (2**63, 1)):
        with pytest.raises((ValueError, TypeError)):
            buffer.read(offset, size)
    with pytest.raises(ValueError, match="device buffer holds"):
        buffer.copy_from(bytes(BLOCK + 1))


@GPU
@pytest.mark.parametrize("size", [0, -1, 2**63 - 1])
def test_senseless_sizes(size):
    with pytest.raises((ValueError, Unavailable)):
        DeviceBuffer(0, size)


@GPU
@pytest.mark.parametrize("device", [-1, 1000])
def test_no_such_device(device):
    with pytest.raises(Unavailable, match="cuDeviceGet"):
        DeviceBuffer(device, BLOCK)


@GPU
def test_a_malformed_handle():
    with pytest.raises(ValueError, match="64 bytes"):
        DeviceBuffer(0, BLOCK, ipc_handle=b"short")
    with pytest.raises(Unavailable, match="cuIpcOpenMemHandle"):
        DeviceBuffer(0, BLOCK, ipc_handle=bytes(64))


OTHER_PROCESS = """
import sys
from gearfall.infra.memory.device import DeviceBuffer
buffer = DeviceBuffer(0, int(sys.argv[1]), ipc_handle=bytes.fromhex(sys.argv[2]))
sys.stdout.buffer.write(buffer.read(0, buffer.size_bytes))
"""


@GPU
def test_another_process_opens_the_buffer(content):
    buffer = DeviceBuffer(0, SIZE_BYTES)
    buffer.copy_from(content)
    command = [sys.executable, "-c", OTHER_PROCESS, str(SIZE_BYTES), buffer.ipc_handle().hex()]
    done = subprocess.run(command, capture_output=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout == content
    assert buffer.read(0, SIZE_BYTES) == content


@GPU
def test_torch_sees_the_bytes_without_a_copy(content):
    import torch

    if not torch.cuda.is_available():
        pytest.skip("torch has no CUDA here")
    buffer = DeviceBuffer(0, SIZE_BYTES)
    buffer.copy_from(content)
    tensor = torch.as_tensor(buffer, device="cuda:0")
    assert tensor.data_ptr() == buffer.native.address
    assert bytes(tensor.cpu().numpy()) == content


def test_a_driver_that_pins_nothing_still_copies(refuse, content):
    refuse("cuMemHostRegister_v2", 801)
    buffer = DeviceBuffer(0, SIZE_BYTES)
    assert buffer.copy_from(content) == 0
    assert buffer.read(0, SIZE_BYTES) == content


@pytest.mark.parametrize("entry", ["cuDevicePrimaryCtxRetain", "cuCtxPushCurrent_v2"])
def test_a_refused_context(refuse, entry):
    refuse(entry, 2)
    with pytest.raises(Unavailable, match=entry.removesuffix("_v2")):
        DeviceBuffer(0, BLOCK)


def test_a_device_without_room(refuse):
    refuse("cuMemAlloc_v2", 2)
    with pytest.raises(Unavailable, match="cuMemAlloc answered CUDA error 2"):
        DeviceBuffer(0, BLOCK)


@pytest.mark.parametrize("entry", ["cuStreamCreate", "cuMemcpyHtoDAsync_v2"])
def test_a_copy_that_fails_ends_the_load(refuse, file, entry):
    buffer = DeviceBuffer(0, SIZE_BYTES)
    refuse(entry, 700)
    with pytest.raises(Unavailable, match=entry.removesuffix("_v2")):
        read_to_device(file, buffer)


def test_a_copy_that_fails_late_is_not_missed(refuse, file):
    buffer = DeviceBuffer(0, SIZE_BYTES)
    refuse("cuStreamSynchronize", 700)
    with pytest.raises(Unavailable, match="cuStreamSynchronize"):
        read_to_device(file, buffer)


@pytest.mark.parametrize(("code", "count"), [(100, 0), (0, 1)])
def test_a_driver_without_a_device(refuse, code, count):
    refuse("cuInit", code)
    assert native.cuda_device_count() == count


def test_a_driver_that_does_not_start(refuse):
    refuse("cuInit", 999)
    with pytest.raises(Unavailable, match="cuInit answered CUDA error 999"):
        native.cuda_device_count()
