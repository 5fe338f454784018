"""Bytes of a model reach the device as the model needs them, never before they are verified.

Runs on a CUDA device where there is one (`make test-gpu`), and everywhere over a driver of our own
(tests/cuda_ext/test_driver_double.py).
"""

import mmap
import os
from collections.abc import Mapping

import pytest

from gearfall.core.errors import CorruptCheckpoint
from gearfall.infra.memory import native
from services.worker.engine.device import DeviceTier

MIB = 1 << 20
SIZES = (5 * MIB + 100, MIB)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not native.cuda_device_count(), reason="there is no CUDA device: nothing was run on one"
    ),
]


class Verified:
    """An arrival that notes what was waited for, and fails beyond a byte of partition 0."""

    def __init__(self, tier_content: list[mmap.mmap], content: list[bytes], fails_at: int) -> None:
        self._memory = tier_content
        self._content = content
        self._fails_at = fails_at

    def wait(self, ends_bytes: Mapping[int, int]) -> None:
        if ends_bytes.get(0, 0) > self._fails_at:
            raise CorruptCheckpoint("a chunk is not what was expected")
        for partition, end in ends_bytes.items():
            self._memory[partition][:end] = self._content[partition][:end]


def shared(size: int) -> tuple[mmap.mmap, mmap.mmap]:
    """Memory of a pool: the store's mapping, and the read-only one of an engine."""
    fd = os.memfd_create("pool")
    os.ftruncate(fd, size)
    writable = mmap.mmap(fd, size)
    readable = mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ)
    os.close(fd)
    return writable, readable


def test_a_prefix_arrives_once_it_is_verified():
    content = [os.urandom(size) for size in SIZES]
    pairs = [shared(size) for size in SIZES]
    below = Verified([writable for writable, _ in pairs], content, fails_at=4 * MIB)
    tier = DeviceTier(0, [readable for _, readable in pairs], below)
    tier.wait({0: MIB + 1})
    assert tier.read(0, 0, MIB + 1) == content[0][: MIB + 1]
    tier.wait({0: 3 * MIB, 1: MIB})
    tier.wait({0: 2 * MIB})
    assert tier.read(0, 0, 3 * MIB) == content[0][: 3 * MIB]
    assert tier.read(1, 0, MIB) == content[1]
    with pytest.raises(CorruptCheckpoint):
        tier.wait({0: SIZES[0]})
    tier.close()
    tier.close()
    assert all(readable.closed for _, readable in pairs)


def test_all_at_once_from_a_resident_model():
    content = os.urandom(SIZES[0])
    writable, readable = shared(SIZES[0])
    writable[:] = content
    tier = DeviceTier(0, [readable], None)
    tier.wait({0: SIZES[0]})
    tier.close()
    assert tier.read(0, 0, SIZES[0]) == content
    with pytest.raises(ValueError, match="closed"):
        tier.wait({0: SIZES[0]})
