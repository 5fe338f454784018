"""Memory on a CUDA device that verified chunks are copied into, and torch's view of it.

Everything here raises Unavailable where there is no device or the driver refuses. The first use
starts the driver: a process must not fork after it.
"""

import mmap
from collections.abc import Mapping

from typing_extensions import Buffer

from gearfall import _cuda_ext
from gearfall.infra.memory.native import gearfall_errors, view_bytes


class DeviceBuffer:
    """Bytes on one device, freed with this object.

    `torch.as_tensor(buffer, device=f"cuda:{buffer.device}")` is a uint8 tensor over them, without a
    copy, that keeps the buffer.
    """

    def __init__(self, device: int, size_bytes: int, *, ipc_handle: bytes | None = None) -> None:
        """Allocate, or open what another process allocated and keeps."""
        with gearfall_errors():
            self.native = _cuda_ext.DeviceBuffer(device, size_bytes, ipc_handle)
        """For `native.read_chunks`."""
        self.device = device
        self.size_bytes = size_bytes

    def ipc_handle(self) -> bytes:
        """Return 64 bytes by which another process opens this memory while this one keeps it."""
        with gearfall_errors():
            return self.native.ipc_handle()

    def copy_from(self, source: Buffer) -> int:
        """Copy host memory to the front and wait; return how many of its bytes could be pinned.

        Pinned memory is read by the device directly. What can't be pinned (a driver without
        read-only registration) goes through the driver's own memory, more slowly. Map pool memory
        MAP_SHARED and read-only for this: pinning a private mapping makes the kernel copy it.
        """
        with gearfall_errors():
            return self.native.copy_from(view_bytes(source))

    def read(self, offset_bytes: int, size_bytes: int) -> bytes:
        """Return a range as the host sees it. Raises ValueError for one that is not here."""
        if offset_bytes < 0 or size_bytes < 0:
            raise ValueError("a range of a device buffer can't be negative")
        if size_bytes == 0:
            return b""
        with gearfall_errors(), mmap.mmap(-1, size_bytes) as host:
            with memoryview(host) as view:
                self.native.read(offset_bytes, view)
            return host[:]

    @property
    def __cuda_array_interface__(self) -> Mapping[str, object]:
        """Version 3 of the interface that torch, numba and cupy agree on."""
        return {
            "shape": (self.size_bytes,),
            "typestr": "|u1",
            "data": (self.native.address, False),
            "version": 3,
        }


class DeviceCopy:
    """Host memory that goes to the front of a device buffer part by part, on a stream of its own.

    What the driver can pin is read by the device directly, and copies of one part overlap the
    pinning of the next. Map pool memory MAP_SHARED and read-only for this.
    """

    def __init__(self, buffer: DeviceBuffer, source: Buffer) -> None:
        """Raises ValueError for a source larger than the buffer."""
        with gearfall_errors():
            self._native = _cuda_ext.DeviceCopy(buffer.native, view_bytes(source))

    @property
    def pinned_bytes(self) -> int:
        """Bytes of the source that are pinned now."""
        return self._native.pinned_bytes

    def copy(self, begin_bytes: int, end_bytes: int) -> None:
        """Start the copy of a range to the same place of the buffer."""
        with gearfall_errors():
            self._native.copy(begin_bytes, end_bytes)

    def wait(self) -> None:
        """Return when all that was started has arrived."""
        with gearfall_errors():
            self._native.wait()

    def close(self) -> None:
        """Wait for all copies, unpin and let go of the source. Idempotent."""
        with gearfall_errors():
            self._native.close()
