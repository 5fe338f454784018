"""The manifest of a checkpoint in the gearfall format: what every byte is, and how to check it.

docs/format.md specifies the format. A manifest that `parse_manifest` returned can be used without
another look at its numbers; everything else about it was refused as CorruptCheckpoint.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

import msgspec
import xxhash

from gearfall.core.dtypes import DTYPE_BYTES
from gearfall.core.errors import CorruptCheckpoint

FORMAT = "gearfall"
FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"
TENSOR_ALIGNMENT_BYTES = 256
"""Every tensor starts at a multiple of this within its partition."""
PAGE_BYTES = 4096
"""Partition sizes and chunk sizes are multiples of this."""

MAX_MANIFEST_BYTES = 32 * 2**20
MAX_TENSORS = 200_000
MAX_PARTITIONS = 64
MAX_PARTITION_BYTES = 2**46
MAX_CHUNK_BYTES = 2**30
MAX_RANK = 16
MAX_FILES = 64

_TENSOR_NAME = re.compile(r"[!-.0-\[\]-~]{1,512}")
"""Printable ASCII without space, slash and backslash."""
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_XXH3_64 = re.compile(r"[0-9a-f]{16}")
_COMMIT = re.compile(r"[0-9a-zA-Z._-]{0,128}")


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What config.json and the tensors say about the model, checked when it was registered."""

    architecture: str
    """Hugging Face class, LlamaForCausalLM."""
    parameters: int
    """Elements of all tensors, tied ones once."""
    context_tokens: int
    vocabulary_size: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    dtype: str
    """Of most of the bytes, as torch writes it."""
    layers: int
    kv_heads: int
    head_dim: int
    has_chat_template: bool

    def kv_bytes_per_token(self, element_bytes: int = 4) -> int:
        """Bytes one cached token takes: a key and a value of every KV head in every layer.

        `element_bytes` is the cache's, not the checkpoint's: the CPU engine caches float32.
        """
        return 2 * self.layers * self.kv_heads * self.head_dim * element_bytes


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor, contiguous in row-major order, at a place of its own."""

    name: str
    dtype: str
    """As torch writes it without the module: bfloat16."""
    shape: tuple[int, ...]
    partition: int
    """Index into `Manifest.partitions`."""
    offset_bytes: int
    """From the partition's start, a multiple of TENSOR_ALIGNMENT_BYTES."""
    size_bytes: int


@dataclass(frozen=True, slots=True)
class AliasEntry:
    """Another name of a stored tensor (tied weights): same dtype, shape and bytes."""

    name: str
    target: str


@dataclass(frozen=True, slots=True)
class PartitionEntry:
    """One file of tensor bytes, read and checked chunk by chunk."""

    file: str
    size_bytes: int
    """A multiple of PAGE_BYTES, padding included."""
    chunk_bytes: int
    """Of every chunk but the last, which may be shorter."""
    checksums: tuple[str, ...]
    """xxh3_64 of each chunk, seed 0, 16 hex digits."""

    def chunk_digests(self) -> list[int]:
        """Return the checksums as the unsigned integers that the chunk reader returns."""
        return [int(checksum, 16) for checksum in self.checksums]


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A small file kept beside the tensors."""

    name: str
    size_bytes: int
    checksum: str
    """xxh3_64 of its bytes, seed 0, 16 hex digits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """One whole checkpoint."""

    format: str = FORMAT
    format_version: int
    model: ModelFacts
    partitions: tuple[PartitionEntry, ...]
    tensors: tuple[TensorEntry, ...]
    """In load order: by partition, then by offset."""
    aliases: tuple[AliasEntry, ...] = ()
    files: tuple[FileEntry, ...] = ()
    source_revision: str = ""
    """Commit of the Hugging Face snapshot it came from; empty where unknown."""

    @property
    def size_bytes(self) -> int:
        """Bytes of all partitions: what the model takes in every tier."""
        return sum(partition.size_bytes for partition in self.partitions)

    def tensors_by_name(self) -> dict[str, TensorEntry]:
        """Every name with the entry of its bytes, aliases included."""
        named = {tensor.name: tensor for tensor in self.tensors}
        named.update((alias.name, named[alias.target]) for alias in self.aliases)
        return named

    def file(self, name: str) -> FileEntry | None:
        """Return the small file of that name, None when the checkpoint has none."""
        return next((entry for entry in self.files if entry.name == name), None)


def manifest_bytes(manifest: Manifest) -> bytes:
    """Encode it as the JSON that lies on disk; the same manifest always gives the same bytes."""
    return msgspec.json.encode(manifest)


def manifest_digest(content: bytes) -> str:
    """xxh3_128 of a manifest's bytes, 32 hex digits: the name of the checkpoint's content."""
    return xxhash.xxh3_128_hexdigest(content)


def checksum(content: bytes | bytearray | memoryview) -> str:
    """xxh3_64 of a chunk or a small file, 16 hex digits."""
    return xxhash.xxh3_64_hexdigest(content)


def is_file_name(name: str) -> bool:
    """Whether a file of a checkpoint may be called so: no separators, no leading dot, no '..'."""
    return _FILE_NAME.fullmatch(name) is not None and ".." not in name


def is_tensor_name(name: str) -> bool:
    """Whether a tensor may be called so: printable ASCII without space, separators and '..'."""
    return _TENSOR_NAME.fullmatch(name) is not None and ".." not in name


def parse_manifest(content: bytes) -> Manifest:
    """Decode and check a manifest; every byte of it may be hostile.

    Raises CorruptCheckpoint, and nothing else, for anything that is not a sound manifest.
    """
    _require(len(content) <= MAX_MANIFEST_BYTES, "is larger than any real one")
    _check_version(content)
    try:
        manifest = msgspec.json.decode(content, type=Manifest)
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpoint(f"the manifest does not decode: {error}") from None
    _check_manifest(manifest)
    return manifest


class _Version(msgspec.Struct):
    format: str
    format_version: int


def _check_version(content: bytes) -> None:
    try:
        version = msgspec.json.decode(content, type=_Version)
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpoint(f"the manifest does not decode: {error}") from None
    _require(version.format == FORMAT, "is not of the gearfall format")
    _require(
        version.format_version == FORMAT_VERSION,
        f"has format_version {str(version.format_version)[:20]}; "
        f"this gearfall reads {FORMAT_VERSION}",
    )


def _check_manifest(manifest: Manifest) -> None:
    _require(1 <= len(manifest.partitions) <= MAX_PARTITIONS, "has no or too many partitions")
    _require(1 <= len(manifest.tensors) <= MAX_TENSORS, "has no or too many tensors")
    _require(len(manifest.aliases) <= MAX_TENSORS, "has too many aliases")
    _require(len(manifest.files) <= MAX_FILES, "has too many files")
    _require(_COMMIT.fullmatch(manifest.source_revision) is not None, "has a bad source_revision")
    _check_facts(manifest.model)
    for partition in manifest.partitions:
        _check_partition(partition)
    for file in manifest.files:
        _check_file(file)
    file_names = [MANIFEST_FILE, *(p.file for p in manifest.partitions)]
    _require_distinct([*file_names, *(f.name for f in manifest.files)], "file")
    for tensor in manifest.tensors:
        _check_tensor(tensor, manifest.partitions)
    _check_no_overlap(manifest.tensors)
    _check_aliases(manifest)


def _check_facts(facts: ModelFacts) -> None:
    _require(0 < len(facts.architecture) <= 128, "has a bad architecture", facts.architecture)
    _require(facts.dtype in DTYPE_BYTES, "has an unknown dtype", facts.dtype)
    _require(0 < facts.parameters < 2**48, "has a bad count of parameters", facts.parameters)
    for name in ("context_tokens", "vocabulary_size", "layers", "kv_heads", "head_dim"):
        value = getattr(facts, name)
        _require(0 < value < 2**31, f"has a bad {name}", value)
    tokens = [*facts.eos_token_ids, *([] if facts.bos_token_id is None else [facts.bos_token_id])]
    _require(len(tokens) <= 256, "has too many special tokens")
    for token in tokens:
        _require(0 <= token < 2**31, "has a bad special token", token)


def _check_partition(partition: PartitionEntry) -> None:
    _require(is_file_name(partition.file), "has a bad partition file name", partition.file)
    size_bytes, chunk_bytes = partition.size_bytes, partition.chunk_bytes
    _require(
        0 < size_bytes <= MAX_PARTITION_BYTES and size_bytes % PAGE_BYTES == 0,
        "has a partition of a bad size",
        size_bytes,
    )
    _require(
        0 < chunk_bytes <= MAX_CHUNK_BYTES and chunk_bytes % PAGE_BYTES == 0,
        "has a partition with bad chunk_bytes",
        chunk_bytes,
    )
    chunks = -(-size_bytes // chunk_bytes)
    _require(len(partition.checksums) == chunks, f"needs {chunks} checksums for {partition.file}")
    for text in partition.checksums:
        _require(_XXH3_64.fullmatch(text) is not None, "has a bad checksum", text)


def _check_file(file: FileEntry) -> None:
    _require(is_file_name(file.name), "has a bad file name", file.name)
    _require(0 <= file.size_bytes < 2**31, "has a file of a bad size", file.size_bytes)
    _require(_XXH3_64.fullmatch(file.checksum) is not None, "has a bad checksum", file.checksum)


def _check_tensor(tensor: TensorEntry, partitions: tuple[PartitionEntry, ...]) -> None:
    _require(is_tensor_name(tensor.name), "has a bad tensor name", tensor.name)
    shown = f"has a tensor {tensor.name[:80]!r} with"
    item_bytes = DTYPE_BYTES.get(tensor.dtype)
    if item_bytes is None:
        raise CorruptCheckpoint(f"the manifest {shown} unknown dtype {tensor.dtype[:40]!r}")
    _require(0 <= tensor.partition < len(partitions), f"{shown} an unknown partition")
    available_bytes = partitions[tensor.partition].size_bytes
    _require(
        len(tensor.shape) <= MAX_RANK and all(0 <= n <= MAX_PARTITION_BYTES for n in tensor.shape),
        f"{shown} a bad shape",
    )
    _require(0 <= tensor.size_bytes <= available_bytes, f"{shown} a bad size", tensor.size_bytes)
    _require(
        tensor.size_bytes == math.prod(tensor.shape) * item_bytes,
        f"{shown} a size that is not its shape times its dtype",
        tensor.size_bytes,
    )
    _require(
        0 <= tensor.offset_bytes <= available_bytes - tensor.size_bytes,
        f"{shown} bytes outside its partition",
        tensor.offset_bytes,
    )
    _require(tensor.offset_bytes % TENSOR_ALIGNMENT_BYTES == 0, f"{shown} an unaligned offset")


def _check_no_overlap(tensors: tuple[TensorEntry, ...]) -> None:
    end_of: dict[int, int] = {}
    last = (0, 0)
    for tensor in tensors:
        place = (tensor.partition, tensor.offset_bytes)
        _require(place >= last, f"does not list {tensor.name[:80]!r} in load order")
        last = place
        _require(
            tensor.offset_bytes >= end_of.get(tensor.partition, 0),
            f"has a tensor {tensor.name[:80]!r} that overlaps another",
        )
        end_of[tensor.partition] = tensor.offset_bytes + tensor.size_bytes


def _check_aliases(manifest: Manifest) -> None:
    stored = [tensor.name for tensor in manifest.tensors]
    _require_distinct([*stored, *(alias.name for alias in manifest.aliases)], "tensor")
    names = set(stored)
    for alias in manifest.aliases:
        _require(is_tensor_name(alias.name), "has a bad alias", alias.name)
        _require(alias.target in names, "has an alias of an unknown tensor", alias.target)


def _require_distinct(names: Iterable[str], kind: str) -> None:
    seen: set[str] = set()
    for name in names:
        _require(name not in seen, f"names a {kind} twice", name)
        seen.add(name)


def _require(holds: bool, complaint: str, found: object = None) -> None:
    if not holds:
        shown = "" if found is None else f": {_shorten(found)}"
        raise CorruptCheckpoint(f"the manifest {complaint}{shown}")


def _shorten(found: object) -> str:
    if isinstance(found, int) and abs(found) >= 2**64:
        return "a number beyond 64 bits"
    text = repr(found)
    return text if len(text) <= 80 else text[:77] + "..."


__all__ = [
    "FORMAT_VERSION",
    "MANIFEST_FILE",
    "MAX_MANIFEST_BYTES",
    "PAGE_BYTES",
    "TENSOR_ALIGNMENT_BYTES",
    "AliasEntry",
    "FileEntry",
    "Manifest",
    "ModelFacts",
    "PartitionEntry",
    "TensorEntry",
    "checksum",
    "is_file_name",
    "is_tensor_name",
    "manifest_bytes",
    "manifest_digest",
    "parse_manifest",
]
