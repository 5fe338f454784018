"""Converts a checked source into a checkpoint in the gearfall format, streaming.

Reads go piece by piece through one chunk buffer, by file descriptor and not by mapping: a source
that shrinks meanwhile is a short read and an error, where a mapping would kill the process.
"""

import os
from collections.abc import Callable
from pathlib import Path

from gearfall.checkpoint.layout import CHUNK_BYTES, load_order, place
from gearfall.checkpoint.partition_writer import PartitionWriter
from gearfall.checkpoint.source import Source, SourceFile
from gearfall.core.errors import CorruptCheckpoint
from gearfall.core.manifest import (
    FORMAT_VERSION,
    MANIFEST_FILE,
    AliasEntry,
    FileEntry,
    Manifest,
    PartitionEntry,
    TensorEntry,
    checksum,
    manifest_bytes,
    parse_manifest,
)
from gearfall.core.safetensors_header import SourceTensor

PARTITION_FILE = "partition-0.bin"
_SAMPLE_BYTES = 4096
_PIECE_BYTES = 2**20
_MAX_LOOKALIKES = 4
"""Keeps a checkpoint made of near-equal tensors from costing a comparison for each pair."""

Report = Callable[[int, int], None]
"""Told (done_bytes, total_bytes) after each chunk, from the converting thread."""

_Located = tuple[SourceFile, SourceTensor]


def convert(source: Source, directory: Path | None, report: Report) -> Manifest:
    """Write partitions, small files and manifest into an empty `directory`, each synced.

    Without a directory nothing is written and the manifest says what would have been. The result
    is the same for the same bytes. Blocks; raises OSError from the disk, CorruptCheckpoint when a
    source file is shorter than its header says, Conflict when one changed meanwhile.
    """
    located = source.tensors()
    aliases = _find_aliases(source, located)
    stored = [located[name] for name in load_order(located) if name not in aliases]
    entries, size_bytes = place([tensor for _, tensor in stored])
    partition = _write_partition(directory, stored, entries, size_bytes, report)
    source.check_unchanged()
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        model=source.facts,
        partitions=(partition,),
        tensors=tuple(entries),
        aliases=tuple(AliasEntry(name, target) for name, target in sorted(aliases.items())),
        files=tuple(_file_entry(name, text) for name, text in source.small_files.items()),
        source_revision=source.revision,
    )
    # What a reader would refuse must not be written.
    parse_manifest(manifest_bytes(manifest))
    if directory is not None:
        for name, text in source.small_files.items():
            write_file(directory / name, text)
        write_file(directory / MANIFEST_FILE, manifest_bytes(manifest))
        sync_directory(directory)
    return manifest


def sync_directory(directory: Path) -> None:
    """Make the names in a directory durable."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _write_partition(
    directory: Path | None,
    stored: list[_Located],
    entries: list[TensorEntry],
    size_bytes: int,
    report: Report,
) -> PartitionEntry:
    with PartitionWriter(directory, PARTITION_FILE, size_bytes, CHUNK_BYTES) as writer:
        for (file, tensor), entry in zip(stored, entries, strict=True):
            writer.pad_to(entry.offset_bytes)
            _copy(file, tensor, writer, lambda: report(writer.end_bytes, size_bytes))
        partition = writer.finish()
    report(size_bytes, size_bytes)
    return partition


def _copy(
    file: SourceFile, tensor: SourceTensor, writer: PartitionWriter, report: Callable[[], None]
) -> None:
    done = 0
    while done < tensor.size_bytes:
        view = writer.free_view(tensor.size_bytes - done)
        count = os.preadv(file.fd, [view], tensor.offset_bytes + done)
        if count == 0:
            raise CorruptCheckpoint(f"{file.name} became shorter while it was read")
        writer.advance(count)
        done += count
        report()


def _find_aliases(source: Source, located: dict[str, _Located]) -> dict[str, str]:
    """Names that need no bytes of their own: noted ties, and tensors equal to an earlier one."""
    aliases: dict[str, str] = {}
    first_of: dict[object, list[str]] = {}
    for name in load_order(located):
        file, tensor = located[name]
        if tensor.size_bytes == 0:
            continue
        candidates = first_of.setdefault(_likeness(file, tensor), [])
        target = next((n for n in candidates if _is_equal(located[n], located[name])), None)
        if target is not None:
            aliases[name] = target
        elif len(candidates) < _MAX_LOOKALIKES:
            candidates.append(name)
    for name, kept in source.ties.items():
        aliases[name] = aliases.get(kept, kept)
    return aliases


def _likeness(file: SourceFile, tensor: SourceTensor) -> object:
    """What equal tensors have in common and few others: dtype, shape, first and last bytes."""
    sample_bytes = min(_SAMPLE_BYTES, tensor.size_bytes)
    tail = tensor.offset_bytes + tensor.size_bytes - sample_bytes
    samples = (
        os.pread(file.fd, sample_bytes, tensor.offset_bytes),
        os.pread(file.fd, sample_bytes, tail),
    )
    return tensor.dtype, tensor.shape, *map(checksum, samples)


def _is_equal(one: _Located, other: _Located) -> bool:
    (file, tensor), (other_file, other_tensor) = one, other
    for done in range(0, tensor.size_bytes, _PIECE_BYTES):
        count = min(_PIECE_BYTES, tensor.size_bytes - done)
        piece = os.pread(file.fd, count, tensor.offset_bytes + done)
        if piece != os.pread(other_file.fd, count, other_tensor.offset_bytes + done):
            return False
    return True


def _file_entry(name: str, content: bytes) -> FileEntry:
    return FileEntry(name, len(content), checksum(content))


def write_file(path: Path, content: bytes) -> None:
    """Create a file with this content, synced. Raises OSError."""
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
