"""The rules of a sound manifest: every number in it is hostile until it passed them."""

import math
import re
from collections.abc import Iterable

from gearfall.core.checkpoint.dtypes import DTYPE_BYTES
from gearfall.core.checkpoint.manifest_entries import (
    MANIFEST_FILE,
    MAX_CHUNK_BYTES,
    MAX_CHUNKS,
    MAX_FILES,
    MAX_PARTITION_BYTES,
    MAX_PARTITIONS,
    MAX_RANK,
    MAX_SECTIONS,
    MAX_SOURCE_FILES,
    MAX_TENSORS,
    PAGE_BYTES,
    SOURCE_HEADERS_FILE,
    TENSOR_ALIGNMENT_BYTES,
    AdapterFacts,
    FileEntry,
    Manifest,
    ModelFacts,
    PartitionEntry,
    TensorEntry,
    is_file_name,
    is_tensor_name,
)
from gearfall.core.checkpoint.manifest_split import Split
from gearfall.core.errors import CorruptCheckpoint, InvalidRequest

_MAX_LORA_RANK = 2**16
_XXH3_64 = re.compile(r"[0-9a-f]{16}")
_XXH3_128 = re.compile(r"[0-9a-f]{32}")
_COMMIT = re.compile(r"[0-9a-zA-Z._-]{0,128}")


def check_manifest(manifest: Manifest) -> None:
    """Raise CorruptCheckpoint unless every number and name can be used without another look."""
    require(1 <= len(manifest.partitions) <= MAX_PARTITIONS, "has no or too many partitions")
    require(1 <= len(manifest.tensors) <= MAX_TENSORS, "has no or too many tensors")
    require(len(manifest.aliases) <= MAX_TENSORS, "has too many aliases")
    require(len(manifest.files) <= MAX_FILES, "has too many files")
    require(_COMMIT.fullmatch(manifest.source_revision) is not None, "has a bad source_revision")
    _check_facts(manifest.model)
    if manifest.adapter is not None:
        _check_adapter(manifest.adapter)
    for partition in manifest.partitions:
        _check_partition(partition)
    chunks = sum(len(partition.checksums) for partition in manifest.partitions)
    require(chunks <= MAX_CHUNKS, "has too many chunks", chunks)
    for file in manifest.files:
        _check_file(file)
    file_names = [MANIFEST_FILE, *(p.file for p in manifest.partitions)]
    _require_distinct([*file_names, *(f.name for f in manifest.files)], "file")
    for tensor in manifest.tensors:
        _check_tensor(tensor, manifest.partitions)
    _check_no_overlap(manifest.tensors)
    _check_parts(manifest)
    _check_aliases(manifest)
    _check_source_files(manifest)


def _check_facts(facts: ModelFacts) -> None:
    require(0 < len(facts.architecture) <= 128, "has a bad architecture", facts.architecture)
    require(facts.dtype in DTYPE_BYTES, "has an unknown dtype", facts.dtype)
    require(0 < facts.parameters < 2**48, "has a bad count of parameters", facts.parameters)
    for name in ("context_tokens", "vocabulary_size", "layers", "kv_heads", "head_dim"):
        value = getattr(facts, name)
        require(0 < value < 2**31, f"has a bad {name}", value)
    tokens = [*facts.eos_token_ids, *([] if facts.bos_token_id is None else [facts.bos_token_id])]
    require(len(tokens) <= 256, "has too many special tokens")
    for token in tokens:
        require(0 <= token < 2**31, "has a bad special token", token)


def _check_adapter(adapter: AdapterFacts) -> None:
    require(_XXH3_128.fullmatch(adapter.base_digest) is not None, "has a bad base_digest")
    require(0 < adapter.rank <= _MAX_LORA_RANK, "has an adapter of a bad rank", adapter.rank)
    require(math.isfinite(adapter.alpha), "has an adapter of a bad alpha", adapter.alpha)


def _check_partition(partition: PartitionEntry) -> None:
    require(is_file_name(partition.file), "has a bad partition file name", partition.file)
    size_bytes, chunk_bytes = partition.size_bytes, partition.chunk_bytes
    require(
        0 < size_bytes <= MAX_PARTITION_BYTES and size_bytes % PAGE_BYTES == 0,
        "has a partition of a bad size",
        size_bytes,
    )
    require(
        0 < chunk_bytes <= MAX_CHUNK_BYTES and chunk_bytes % PAGE_BYTES == 0,
        "has a partition with bad chunk_bytes",
        chunk_bytes,
    )
    chunks = -(-size_bytes // chunk_bytes)
    require(len(partition.checksums) == chunks, f"needs {chunks} checksums for {partition.file}")
    for text in partition.checksums:
        require(_XXH3_64.fullmatch(text) is not None, "has a bad checksum", text)


def _check_file(file: FileEntry) -> None:
    require(is_file_name(file.name), "has a bad file name", file.name)
    require(0 <= file.size_bytes < 2**31, "has a file of a bad size", file.size_bytes)
    require(_XXH3_64.fullmatch(file.checksum) is not None, "has a bad checksum", file.checksum)


def _check_tensor(tensor: TensorEntry, partitions: tuple[PartitionEntry, ...]) -> None:
    require(is_tensor_name(tensor.name), "has a bad tensor name", tensor.name)
    shown = f"has a tensor {tensor.name[:80]!r} with"
    item_bytes = DTYPE_BYTES.get(tensor.dtype)
    if item_bytes is None:
        raise CorruptCheckpoint(f"the manifest {shown} unknown dtype {tensor.dtype[:40]!r}")
    require(0 <= tensor.partition < len(partitions), f"{shown} an unknown partition")
    available_bytes = partitions[tensor.partition].size_bytes
    require(
        len(tensor.shape) <= MAX_RANK and all(0 <= n <= MAX_PARTITION_BYTES for n in tensor.shape),
        f"{shown} a bad shape",
    )
    require(0 <= tensor.size_bytes <= available_bytes, f"{shown} a bad size", tensor.size_bytes)
    require(
        tensor.size_bytes == math.prod(tensor.shape) * item_bytes,
        f"{shown} a size that is not its shape times its dtype",
        tensor.size_bytes,
    )
    require(
        0 <= tensor.offset_bytes <= available_bytes - tensor.size_bytes,
        f"{shown} bytes outside its partition",
        tensor.offset_bytes,
    )
    require(tensor.offset_bytes % TENSOR_ALIGNMENT_BYTES == 0, f"{shown} an unaligned offset")


def _check_no_overlap(tensors: tuple[TensorEntry, ...]) -> None:
    end_of: dict[int, int] = {}
    last = (0, 0)
    for tensor in tensors:
        place = (tensor.partition, tensor.offset_bytes)
        require(place >= last, f"does not list {tensor.name[:80]!r} in load order")
        last = place
        require(
            tensor.offset_bytes >= end_of.get(tensor.partition, 0),
            f"has a tensor {tensor.name[:80]!r} that overlaps another",
        )
        end_of[tensor.partition] = tensor.offset_bytes + tensor.size_bytes


def _check_parts(manifest: Manifest) -> None:
    first_of: dict[str, TensorEntry] = {}
    partitions_of: dict[str, set[int]] = {}
    for tensor in manifest.tensors:
        shown = f"has a tensor {tensor.name[:80]!r}"
        if tensor.split is not None:
            _check_split(tensor, tensor.split, manifest.ranks)
        partitions = partitions_of.setdefault(tensor.name, set())
        require(tensor.partition not in partitions, f"{shown} twice in a partition")
        partitions.add(tensor.partition)
        first = first_of.setdefault(tensor.name, tensor)
        require(
            (tensor.dtype, tensor.split, tensor.full_shape)
            == (first.dtype, first.split, first.full_shape),
            f"{shown} whose entries differ",
        )
    for name, first in first_of.items():
        is_whole = first.split is None or len(partitions_of[name]) == manifest.ranks
        require(is_whole, f"lacks parts of the tensor {name[:80]!r}")


def _check_split(tensor: TensorEntry, split: Split, ranks: int) -> None:
    shown = f"has a tensor {tensor.name[:80]!r} with"
    require(0 <= split.dimension < len(tensor.shape), f"{shown} a bad split dimension")
    require(1 <= len(split.sections) <= MAX_SECTIONS, f"{shown} no or too many sections")
    for section in split.sections:
        unit, rest = divmod(section.length, max(1, section.units))
        require(
            0 < section.units <= section.length <= MAX_PARTITION_BYTES and not rest,
            f"{shown} a bad section",
        )
        require(
            0 <= section.members <= unit and not unit % max(1, section.members),
            f"{shown} a bad section",
        )
    try:
        expected = split.part_shape(tensor.shape, tensor.partition, ranks)
    except InvalidRequest as error:
        raise CorruptCheckpoint(f"the manifest {shown} a bad split: {error.message}") from None
    require(tensor.shape == expected, f"{shown} a part of another shape than its split says")


def _check_source_files(manifest: Manifest) -> None:
    sources = manifest.source_files
    require(len(sources) <= MAX_SOURCE_FILES, "has too many source files")
    for source in sources:
        require(is_file_name(source.name), "has a bad source file name", source.name)
        require(
            8 < source.header_bytes <= source.size_bytes <= MAX_PARTITION_BYTES,
            "has a source file of a bad size",
            source.size_bytes,
        )
    _require_distinct([*(s.name for s in sources), *(f.name for f in manifest.files)], "file")
    headers = manifest.file(SOURCE_HEADERS_FILE)
    header_bytes = 0 if headers is None else headers.size_bytes
    require(
        header_bytes == sum(source.header_bytes for source in sources),
        f"has a {SOURCE_HEADERS_FILE} of another length than its source files' headers",
    )


def _check_aliases(manifest: Manifest) -> None:
    names = {tensor.name for tensor in manifest.tensors}
    _require_distinct([*names, *(alias.name for alias in manifest.aliases)], "tensor")
    for alias in manifest.aliases:
        require(is_tensor_name(alias.name), "has a bad alias", alias.name)
        require(alias.target in names, "has an alias of an unknown tensor", alias.target)


def _require_distinct(names: Iterable[str], kind: str) -> None:
    seen: set[str] = set()
    for name in names:
        require(name not in seen, f"names a {kind} twice", name)
        seen.add(name)


def require(holds: bool, complaint: str, found: object = None) -> None:
    """Raise CorruptCheckpoint with the complaint about a manifest unless it holds."""
    if not holds:
        shown = "" if found is None else f": {_shorten(found)}"
        raise CorruptCheckpoint(f"the manifest {complaint}{shown}")


def _shorten(found: object) -> str:
    if isinstance(found, int) and abs(found) >= 2**64:
        return "a number beyond 64 bits"
    text = repr(found)
    return text if len(text) <= 80 else text[:77] + "..."
