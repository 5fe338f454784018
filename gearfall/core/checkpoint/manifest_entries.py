"""The values a checkpoint's manifest is made of, and its limits."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from gearfall.core.checkpoint.dtypes import DTYPE_BYTES
from gearfall.core.checkpoint.manifest_split import Split
from gearfall.core.errors import InvalidRequest

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
MAX_CHUNK_BYTES = 2**28
MAX_CHUNKS = 2**19
"""Of all partitions together: 2 TiB in chunks of 4 MiB."""
MAX_RANK = 16
MAX_SECTIONS = 16
MAX_FILES = 64
MAX_SOURCE_FILES = 4096
SOURCE_HEADERS_FILE = "source-headers.bin"
"""The headers of the safetensors files a checkpoint was made from, one behind the other."""

_TENSOR_NAME = re.compile(r"[!-.0-\[\]-~]{1,512}")
"""Printable ASCII without space, slash and backslash."""
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


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
class AdapterFacts:
    """What makes a checkpoint a LoRA adapter: useful with one base only."""

    base_digest: str
    """Of the base checkpoint's manifest, 32 hex digits."""
    rank: int
    """Inner length of the two factors, where a module has none of its own."""
    alpha: float
    is_rank_stabilised: bool
    """Whether the product is scaled by alpha / sqrt(rank) instead of alpha / rank."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor, or one rank's part of it, contiguous in row-major order at a place of its own."""

    name: str
    dtype: str
    """As torch writes it without the module: bfloat16."""
    shape: tuple[int, ...]
    """Of what lies here: of the part where the tensor is split."""
    partition: int
    """Index into `Manifest.partitions`; a part is that of the rank of the same number."""
    offset_bytes: int
    """From the partition's start, a multiple of TENSOR_ALIGNMENT_BYTES."""
    size_bytes: int
    split: Split | None = None
    """How ranks share the tensor; None where each needs it whole."""

    @property
    def full_shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        return self.shape if self.split is None else self.split.full_shape(self.shape)

    @property
    def full_bytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.full_shape) * DTYPE_BYTES[self.dtype]


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


@dataclass(frozen=True, slots=True)
class SourceFileEntry:
    """One safetensors file that the tensors came from, in the order of its header."""

    name: str
    size_bytes: int
    header_bytes: int
    """Bytes before the tensors, the length field's 8 included; kept in SOURCE_HEADERS_FILE."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """One whole checkpoint."""

    format: str = FORMAT
    format_version: int
    model: ModelFacts
    adapter: AdapterFacts | None = None
    """Present in a LoRA adapter; `model` then speaks of its base, but for `parameters`, `dtype`."""
    partitions: tuple[PartitionEntry, ...]
    """One for each tensor-parallel rank."""
    tensors: tuple[TensorEntry, ...]
    """In load order: by partition, then by offset. Ranks make several entries of one name."""
    aliases: tuple[AliasEntry, ...] = ()
    files: tuple[FileEntry, ...] = ()
    source_files: tuple[SourceFileEntry, ...] = ()
    """What the export writes again; empty where the source was no safetensors file."""
    source_revision: str = ""
    """Commit of the Hugging Face snapshot it came from; empty where unknown."""

    @property
    def size_bytes(self) -> int:
        """Bytes of all partitions: what the model takes in every tier."""
        return sum(partition.size_bytes for partition in self.partitions)

    @property
    def ranks(self) -> int:
        """Tensor-parallel ranks that it was written for."""
        return len(self.partitions)

    def tensors_by_name(self) -> dict[str, TensorEntry]:
        """Every name with the entry of its bytes, aliases included.

        Raises InvalidRequest where tensors lie in parts: ask `entries_by_name` then.
        """
        named = self.entries_by_name()
        if any(entries[0].split and len(entries) > 1 for entries in named.values()):
            raise InvalidRequest(f"the checkpoint is cut for {self.ranks} ranks")
        return {name: entries[0] for name, entries in named.items()}

    def entries_by_name(self) -> dict[str, Sequence[TensorEntry]]:
        """Every name with all entries of its bytes by partition, aliases included."""
        named: dict[str, list[TensorEntry]] = {}
        for tensor in self.tensors:
            named.setdefault(tensor.name, []).append(tensor)
        named.update((alias.name, named[alias.target]) for alias in self.aliases)
        return dict(named)

    def file(self, name: str) -> FileEntry | None:
        """Return the small file of that name, None when the checkpoint has none."""
        return next((entry for entry in self.files if entry.name == name), None)


def is_file_name(name: str) -> bool:
    """Whether a file of a checkpoint may be called so: no separators, no leading dot, no '..'."""
    return _FILE_NAME.fullmatch(name) is not None and ".." not in name


def is_tensor_name(name: str) -> bool:
    """Whether a tensor may be called so: printable ASCII without space, separators and '..'."""
    return _TENSOR_NAME.fullmatch(name) is not None and ".." not in name
