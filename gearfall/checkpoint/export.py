"""Writes the safetensors files again that a checkpoint was made from, byte for byte the same."""

import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from gearfall.checkpoint.directory import write_file
from gearfall.checkpoint.plan_reader import read_plan
from gearfall.checkpoint.reading import Checkpoint
from gearfall.checkpoint.reshard import TensorPlan, plan_rank
from gearfall.checkpoint.verification import verify
from gearfall.core.checkpoint.manifest import SOURCE_HEADERS_FILE, SourceFileEntry
from gearfall.core.checkpoint.safetensors_header import LENGTH_BYTES, parse_header
from gearfall.core.errors import CorruptCheckpoint, InvalidRequest

Report = Callable[[int, int], None]
"""Told (done_bytes, total_bytes); half of the bytes are read to be verified, half written."""


@dataclass(frozen=True, slots=True)
class ExportedFile:
    """One file that was written."""

    name: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class _Restored:
    """A safetensors file before it is written: its header and its tensors in their order."""

    source: SourceFileEntry
    header: bytes
    plans: tuple[TensorPlan, ...]


def export(checkpoint: Checkpoint, directory: Path, report: Report) -> tuple[ExportedFile, ...]:
    """Verify the checkpoint, then write its source's files into an empty directory, each synced.

    Raises CorruptCheckpoint that names what is damaged, InvalidRequest when the checkpoint does
    not know what it was made from, OSError from the disk.
    """
    restored = tuple(_restore(checkpoint))
    written_bytes = sum(file.source.size_bytes for file in restored)
    total_bytes = checkpoint.manifest.size_bytes + written_bytes
    verify(checkpoint, lambda done, _: report(done, total_bytes)).check()
    done_bytes = checkpoint.manifest.size_bytes
    exported = []
    with checkpoint.open_partitions() as fds:
        for file in restored:
            for size_bytes in _write(file, fds, directory):
                done_bytes += size_bytes
                report(done_bytes, total_bytes)
            exported.append(ExportedFile(file.source.name, file.source.size_bytes))
    for entry in checkpoint.manifest.files:
        if entry.name != SOURCE_HEADERS_FILE:
            write_file(directory / entry.name, checkpoint.read_file(entry))
            exported.append(ExportedFile(entry.name, entry.size_bytes))
    return tuple(exported)


def _restore(checkpoint: Checkpoint) -> Iterator[_Restored]:
    headers_entry = checkpoint.manifest.file(SOURCE_HEADERS_FILE)
    if headers_entry is None:
        raise InvalidRequest("the checkpoint does not keep the headers of its source", param="path")
    headers = checkpoint.read_file(headers_entry)
    plans = plan_rank(checkpoint.manifest, 0, 1)
    begin = 0
    for source in checkpoint.manifest.source_files:
        header = headers[begin : begin + source.header_bytes]
        begin += source.header_bytes
        if struct.unpack("<Q", header[:LENGTH_BYTES]) != (len(header) - LENGTH_BYTES,):
            raise CorruptCheckpoint(f"the kept header of {source.name} has another length")
        tensors = parse_header(header[LENGTH_BYTES:], source.size_bytes).tensors
        for tensor in tensors:
            plan = plans.get(tensor.name)
            if plan is None or (plan.dtype, plan.shape) != (tensor.dtype, tensor.shape):
                raise CorruptCheckpoint(
                    f"the kept header of {source.name} has a tensor {tensor.name!r} that the "
                    "manifest has not or has otherwise"
                )
        yield _Restored(source, header, tuple(plans[tensor.name] for tensor in tensors))


def _write(file: _Restored, fds: tuple[int, ...], directory: Path) -> Iterator[int]:
    """Write one file; yield the sizes of header and tensors as they are written."""
    with (directory / file.source.name).open("xb") as target:
        os.posix_fallocate(target.fileno(), 0, file.source.size_bytes)
        target.write(file.header)
        yield len(file.header)
        for plan in file.plans:
            read_plan(plan, fds, target.write)
            yield plan.size_bytes
        target.flush()
        os.fsync(target.fileno())
