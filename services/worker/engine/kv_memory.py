"""The engine's KV cache in shared memory, which the worker maps to move blocks between machines."""

import contextlib
import mmap
import os
from collections.abc import Sequence

import torch

from gearfall.infra.memory.native import PoolFile
from services.worker.engine.batching.kv_blocks import BLOCK_TOKENS
from services.worker.engine_link.kv_layout import KvLayer, KvLayout

_HUGE_PAGE_BYTES = 2 << 20
_PAGE_FLOATS = mmap.PAGESIZE // torch.float32.itemsize


class EngineKvMemory:
    """One file of shared memory that grows layer by layer; freed when nobody has it any more.

    What was never written takes no memory: that needs small pages, since the first tokens of a
    sequence touch a little of every layer. On huge pages the first pass of a model of 39 layers
    would clear 156 MiB before it answers.
    """

    def __init__(self, total_blocks: int) -> None:
        self._total_blocks = total_blocks
        self._file: PoolFile | None = None
        self._size_bytes = 0
        self._layers: dict[int, KvLayer] = {}
        self._parts: list[torch.Tensor] = []

    @property
    def layout(self) -> KvLayout:
        """Where every layer lies, in the order of the model's layers."""
        layers = tuple(layer for _, layer in sorted(self._layers.items()))
        return KvLayout(self._total_blocks, BLOCK_TOKENS, self._size_bytes, layers)

    def fileno(self) -> int:
        """Return the descriptor, which stays this object's; there must be a layer."""
        assert self._file is not None
        return self._file.fileno()

    def add_layer(
        self, index: int, kv_heads: int, head_dim: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a layer's keys and values, zeros: f32[blocks, BLOCK_TOKENS, kv_heads, head_dim].

        Raises OSError where there is no memory to be had.
        """
        assert index not in self._layers
        shape = (self._total_blocks, BLOCK_TOKENS, kv_heads, head_dim)
        block_bytes = torch.Size(shape[1:]).numel() * torch.float32.itemsize
        values_at = _aligned(self._total_blocks * block_bytes)
        offset = self._grow(2 * values_at)
        self._layers[index] = KvLayer(offset, offset + values_at, block_bytes)
        mapping = mmap.mmap(self.fileno(), 2 * values_at, offset=offset)
        with contextlib.suppress(OSError):  # a kernel that knows no huge pages
            mapping.madvise(mmap.MADV_NOHUGEPAGE)
        keys, values = (
            torch.frombuffer(
                mapping, dtype=torch.float32, count=torch.Size(shape).numel(), offset=start
            ).view(shape)
            for start in (0, values_at)
        )
        self._parts += (keys, values)
        return keys, values

    def touch(self, blocks: Sequence[int]) -> None:
        """Have the memory of these blocks be there and mapped. Does not hold the interpreter."""
        table = torch.tensor(blocks, dtype=torch.int64)
        for part in self._parts:
            part.flatten(1)[:, ::_PAGE_FLOATS].index_select(0, table)

    def _grow(self, size_bytes: int) -> int:
        """Lengthen the file by `size_bytes`; return where that part begins."""
        offset = self._size_bytes
        if self._file is None:
            self._file = PoolFile(size_bytes)
        os.ftruncate(self._file.fileno(), offset + size_bytes)
        self._size_bytes = offset + size_bytes
        return offset


def _aligned(size_bytes: int) -> int:
    """Round up so that the next part can be mapped, on huge pages if it is large enough."""
    unit = mmap.ALLOCATIONGRANULARITY if size_bytes < _HUGE_PAGE_BYTES else _HUGE_PAGE_BYTES
    return -(-size_bytes // unit) * unit
