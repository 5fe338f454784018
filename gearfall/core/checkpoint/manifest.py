"""The manifest of a checkpoint in the gearfall format: what every byte is, and how to check it.

docs/format.md specifies the format. A manifest that `parse_manifest` returned can be used without
another look at its numbers; everything else about it was refused as CorruptCheckpoint.
"""

import msgspec
import xxhash

from gearfall.core.checkpoint.manifest_bounds import check_bounds
from gearfall.core.checkpoint.manifest_checks import check_manifest
from gearfall.core.checkpoint.manifest_entries import (
    FORMAT_VERSION,
    MANIFEST_FILE,
    MAX_MANIFEST_BYTES,
    MAX_PARTITIONS,
    MAX_RANK,
    MAX_TENSORS,
    PAGE_BYTES,
    SOURCE_HEADERS_FILE,
    TENSOR_ALIGNMENT_BYTES,
    AdapterFacts,
    AliasEntry,
    FileEntry,
    Manifest,
    ModelFacts,
    PartitionEntry,
    SourceFileEntry,
    TensorEntry,
    is_file_name,
    is_tensor_name,
)
from gearfall.core.errors import CorruptCheckpoint


def manifest_bytes(manifest: Manifest) -> bytes:
    """Encode it as the JSON that lies on disk; the same manifest always gives the same bytes."""
    return msgspec.json.encode(manifest)


def manifest_digest(content: bytes) -> str:
    """xxh3_128 of a manifest's bytes, 32 hex digits: the name of the checkpoint's content."""
    return xxhash.xxh3_128_hexdigest(content)


def checksum(content: bytes | bytearray | memoryview) -> str:
    """xxh3_64 of a chunk or a small file, 16 hex digits."""
    return xxhash.xxh3_64_hexdigest(content)


def parse_manifest(content: bytes) -> Manifest:
    """Decode and check a manifest; every byte of it may be hostile.

    Raises CorruptCheckpoint, and nothing else, for anything that is not a sound manifest.
    """
    check_bounds(content)
    try:
        manifest = msgspec.json.decode(content, type=Manifest)
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpoint(f"the manifest does not decode: {error}") from None
    check_manifest(manifest)
    return manifest


__all__ = [
    "FORMAT_VERSION",
    "MANIFEST_FILE",
    "MAX_MANIFEST_BYTES",
    "MAX_PARTITIONS",
    "MAX_RANK",
    "MAX_TENSORS",
    "PAGE_BYTES",
    "SOURCE_HEADERS_FILE",
    "TENSOR_ALIGNMENT_BYTES",
    "AdapterFacts",
    "AliasEntry",
    "FileEntry",
    "Manifest",
    "ModelFacts",
    "PartitionEntry",
    "SourceFileEntry",
    "TensorEntry",
    "checksum",
    "is_file_name",
    "is_tensor_name",
    "manifest_bytes",
    "manifest_digest",
    "parse_manifest",
]
