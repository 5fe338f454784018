"""Converts a checked source into a checkpoint in the gearfall format, streaming.

Memory stays at one chunk buffer and a few MiB whatever the model's size: see `plan_reader`.
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from gearfall.checkpoint.aliases import find_aliases
from gearfall.checkpoint.directory import sync_directory, write_file
from gearfall.checkpoint.layout import CHUNK_BYTES, REPLICATED_MAX_BYTES, load_order, place
from gearfall.checkpoint.partition_writer import PartitionWriter
from gearfall.checkpoint.plan_reader import read_into, read_plan
from gearfall.checkpoint.reshard import Part, TensorPlan, plan_slice
from gearfall.checkpoint.source import Source, SourceFile
from gearfall.checkpoint.tensor_parallel import check_ranks
from gearfall.core.checkpoint.manifest import (
    FORMAT_VERSION,
    MANIFEST_FILE,
    MAX_PARTITIONS,
    MAX_TENSORS,
    SOURCE_HEADERS_FILE,
    AliasEntry,
    FileEntry,
    Manifest,
    PartitionEntry,
    SourceFileEntry,
    TensorEntry,
    checksum,
    manifest_bytes,
    parse_manifest,
)
from gearfall.core.checkpoint.manifest_split import Split
from gearfall.core.checkpoint.safetensors_header import SourceTensor
from gearfall.core.errors import CorruptCheckpoint, InvalidRequest

Report = Callable[[int, int], None]
"""Told (done_bytes, total_bytes) after each block, from the converting thread."""

_Located = tuple[SourceFile, SourceTensor]


@dataclass(frozen=True, slots=True)
class _Cut:
    """What one rank's partition holds of one source tensor."""

    file: SourceFile
    plan: TensorPlan
    """Of bytes of the source file, which counts as partition 0."""
    entry: TensorEntry


@dataclass(frozen=True, slots=True)
class _Layout:
    """One partition before a byte of it was read."""

    file: str
    size_bytes: int
    cuts: Sequence[_Cut]


def convert(source: Source, directory: Path | None, report: Report, *, ranks: int = 1) -> Manifest:
    """Write partitions, small files and manifest into an empty `directory`, each synced.

    Without a directory nothing is written and the manifest says what would have been. The result
    is the same for the same bytes and ranks. Blocks; raises OSError from the disk, InvalidRequest
    when the model can't be cut for `ranks`, CorruptCheckpoint when a source file is shorter than
    its header says, Conflict when one changed meanwhile.
    """
    if not 1 <= ranks <= MAX_PARTITIONS:
        raise InvalidRequest(f"ranks must be 1 to {MAX_PARTITIONS}, not {ranks}", param="ranks")
    check_ranks(source.rules, ranks)
    located = source.tensors()
    aliases = find_aliases(source, located)
    stored = [located[name] for name in load_order(located) if name not in aliases]
    layouts = [_lay_out(stored, source.rules.splits, rank, ranks) for rank in range(ranks)]
    entries = tuple(cut.entry for layout in layouts for cut in layout.cuts)
    if max(len(entries), len(aliases)) > MAX_TENSORS:
        raise InvalidRequest(
            f"{len(entries)} entries of tensors: the format has room for {MAX_TENSORS}",
            param="ranks" if ranks > 1 else "path",
        )
    small_files = source.small_files | _headers(source)
    partitions = _write_partitions(directory, layouts, report)
    source.check_unchanged()
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        model=source.facts,
        adapter=source.adapter,
        partitions=partitions,
        tensors=entries,
        aliases=tuple(AliasEntry(name, target) for name, target in sorted(aliases.items())),
        files=tuple(_file_entry(name, text) for name, text in small_files.items()),
        source_files=tuple(_source_entry(file) for file in source.files),
        source_revision=source.revision,
    )
    content = manifest_bytes(manifest)
    # What a reader would refuse must not be written.
    parse_manifest(content)
    if directory is not None:
        for name, text in small_files.items():
            write_file(directory / name, text)
        write_file(directory / MANIFEST_FILE, content)
        sync_directory(directory)
    return manifest


def _lay_out(
    stored: Sequence[_Located], splits: Mapping[str, Split], rank: int, ranks: int
) -> _Layout:
    cuts = []
    for file, tensor in stored:
        split = splits.get(tensor.name)
        is_replicated = tensor.size_bytes <= REPLICATED_MAX_BYTES
        if split is not None or rank == 0 or is_replicated:
            cuts.append((file, *_cut(tensor, split, rank, ranks)))
    entries, size_bytes = place([tensor for _, tensor, _ in cuts], rank, splits)
    placed = zip(cuts, entries, strict=True)
    return _Layout(
        f"partition-{rank}.bin",
        size_bytes,
        [_Cut(file, plan, entry) for (file, _, plan), entry in placed],
    )


def _cut(
    tensor: SourceTensor, split: Split | None, rank: int, ranks: int
) -> tuple[SourceTensor, TensorPlan]:
    """Return a rank's part of a tensor and where its bytes lie in the source file."""
    if split is None:
        everything = ((0, math.prod(tensor.shape)),)
        part = Part(0, tensor.offset_bytes, everything)
        return tensor, plan_slice(tensor.dtype, everything[0][1:], 0, (part,), everything)
    part = Part(0, tensor.offset_bytes, ((0, tensor.shape[split.dimension]),))
    wanted = split.ranges(rank, ranks)
    plan = plan_slice(tensor.dtype, tensor.shape, split.dimension, (part,), wanted)
    return replace(tensor, shape=plan.shape, size_bytes=plan.size_bytes), plan


def _write_partitions(
    directory: Path | None, layouts: Sequence[_Layout], report: Report
) -> tuple[PartitionEntry, ...]:
    total_bytes = sum(layout.size_bytes for layout in layouts)
    partitions = []
    for number, layout in enumerate(layouts):
        before_bytes = sum(earlier.size_bytes for earlier in layouts[:number])
        progress = partial(_report_from, report, before_bytes, total_bytes)
        partitions.append(_write_partition(directory, layout, progress))
        progress(layout.size_bytes)
    return tuple(partitions)


def _report_from(report: Report, before_bytes: int, total_bytes: int, end_bytes: int) -> None:
    report(before_bytes + end_bytes, total_bytes)


def _write_partition(
    directory: Path | None, layout: _Layout, report: Callable[[int], None]
) -> PartitionEntry:
    with PartitionWriter(directory, layout.file, layout.size_bytes, CHUNK_BYTES) as writer:

        def append(block: memoryview) -> None:
            writer.append(block)
            report(writer.end_bytes)

        for cut in layout.cuts:
            writer.pad_to(cut.entry.offset_bytes)
            try:
                read_plan(cut.plan, (cut.file.fd,), append)
            except CorruptCheckpoint as error:
                raise CorruptCheckpoint(f"{cut.file.name}: {error.message}") from None
        return writer.finish()


def _headers(source: Source) -> dict[str, bytes]:
    """The source files' headers as one small file, so that the export can write them again."""
    headers = bytearray(sum(file.header.start_bytes for file in source.files))
    done = 0
    for file in source.files:
        end = done + file.header.start_bytes
        with memoryview(headers) as view:
            read_into(file.fd, view[done:end], 0)
        done = end
    return {SOURCE_HEADERS_FILE: bytes(headers)}


def _source_entry(file: SourceFile) -> SourceFileEntry:
    return SourceFileEntry(file.name, os.fstat(file.fd).st_size, file.header.start_bytes)


def _file_entry(name: str, content: bytes) -> FileEntry:
    return FileEntry(name, len(content), checksum(content))
