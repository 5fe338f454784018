"""The last tier of a load on a CUDA device: a partition's bytes follow their verification there."""

from collections.abc import Mapping, Sequence
from mmap import mmap

import torch

from gearfall.infra.memory.device import DeviceBuffer, DeviceCopy
from services.worker.engine.model.units import Arrival


class DeviceTier:
    """Device memory of all partitions; implements `units.Arrival`.

    Copies run on a stream of their own from pinned pool memory, in the order in which the model
    needs the bytes, while the store goes on reading what comes later.
    """

    def __init__(self, device: int, mappings: Sequence[mmap], below: Arrival | None) -> None:
        """`mappings`: read-only and MAP_SHARED, closed by `close`; `below` is None where all of
        them are verified.

        Raises Unavailable when the device is not there or has no room.
        """
        self._device = device
        self._below = below
        self._mappings = mappings
        self._buffers = [DeviceBuffer(device, len(mapping)) for mapping in mappings]
        self._copies = [
            DeviceCopy(buffer, mapping)
            for buffer, mapping in zip(self._buffers, mappings, strict=True)
        ]
        self._copied_bytes = [0] * len(mappings)

    def partitions(self) -> list[torch.Tensor]:
        """Return the device memory as uint8 tensors over it, one a partition."""
        device = f"cuda:{self._device}"
        return [torch.as_tensor(buffer, device=device) for buffer in self._buffers]

    def wait(self, ends_bytes: Mapping[int, int]) -> None:
        """Return when each of these partitions is on the device up to the byte that is named."""
        if self._below is not None:
            self._below.wait(ends_bytes)
        for partition, end_bytes in ends_bytes.items():
            begin_bytes = self._copied_bytes[partition]
            if end_bytes > begin_bytes:
                self._copies[partition].copy(begin_bytes, end_bytes)
                self._copied_bytes[partition] = end_bytes
        for partition in ends_bytes:
            self._copies[partition].wait()

    def read(self, partition: int, offset_bytes: int, size_bytes: int) -> bytes:
        """Return a range of a partition as the device has it."""
        return self._buffers[partition].read(offset_bytes, size_bytes)

    def close(self) -> None:
        """Unpin and unmap the pool's memory: nothing more is copied. Idempotent."""
        for copy in self._copies:
            copy.close()
        for mapping in self._mappings:
            mapping.close()
