"""The header of a safetensors file, parsed with every byte held hostile.

A file is an 8-byte little-endian header length n, n bytes of JSON, and the tensors' bytes, which
must cover the rest of the file without a hole or an overlap.
"""

import math
import struct
from dataclasses import dataclass

import msgspec

from gearfall.core.dtypes import DTYPE_BYTES, DTYPE_OF_SAFETENSORS
from gearfall.core.errors import CorruptCheckpoint, InvalidRequest
from gearfall.core.manifest import MAX_RANK, MAX_TENSORS, is_tensor_name

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 32 * 2**20
_LENGTH = struct.Struct("<Q")
_METADATA = "__metadata__"


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """One tensor of a safetensors file."""

    name: str
    dtype: str
    """As torch writes it."""
    shape: tuple[int, ...]
    offset_bytes: int
    """From the file's start."""
    size_bytes: int

    @property
    def elements(self) -> int:
        """How many there are; of half bytes, how many pairs."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class SafetensorsHeader:
    """What one file holds."""

    tensors: tuple[SourceTensor, ...]
    """By offset."""
    metadata: dict[str, str]
    start_bytes: int
    """Where the tensors' bytes start: the length of all that stands before them."""


class _Entry(msgspec.Struct):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


def header_bytes(start: bytes, file_bytes: int) -> int:
    """Return the header's length from a file's first 8 bytes, checked against the file's size.

    Raises CorruptCheckpoint before anybody allocates what a hostile length claims.
    """
    if len(start) != LENGTH_BYTES or file_bytes < LENGTH_BYTES:
        raise CorruptCheckpoint("the file is too short for a safetensors header")
    (size,) = _LENGTH.unpack(start)
    if size > file_bytes - LENGTH_BYTES:
        raise CorruptCheckpoint(
            f"the safetensors header claims {size} bytes in a file of {file_bytes}"
        )
    if not 2 <= size <= MAX_HEADER_BYTES:
        raise CorruptCheckpoint(f"a safetensors header of {size} bytes is not a real one")
    return int(size)


def parse_header(header: bytes, file_bytes: int) -> SafetensorsHeader:
    """Decode the JSON header of a file of `file_bytes`.

    Raises CorruptCheckpoint for anything unsound (a truncated file included), InvalidRequest for
    a dtype that gearfall does not know.
    """
    try:
        raw = msgspec.json.decode(header, type=dict[str, msgspec.Raw])
        metadata = _decode_metadata(raw.pop(_METADATA, None))
        entries = {name: msgspec.json.decode(text, type=_Entry) for name, text in raw.items()}
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpoint(f"the safetensors header does not decode: {error}") from None
    if len(entries) > MAX_TENSORS:
        raise CorruptCheckpoint(f"the safetensors header lists more than {MAX_TENSORS} tensors")
    start = LENGTH_BYTES + len(header)
    tensors = [_to_tensor(name, entry, start) for name, entry in entries.items()]
    tensors.sort(key=lambda tensor: (tensor.offset_bytes, tensor.size_bytes))
    _check_cover(tensors, start, file_bytes)
    return SafetensorsHeader(tuple(tensors), metadata, start)


def _decode_metadata(text: msgspec.Raw | None) -> dict[str, str]:
    if text is None:
        return {}
    return msgspec.json.decode(text, type=dict[str, str] | None) or {}


def _to_tensor(name: str, entry: _Entry, start: int) -> SourceTensor:
    if not is_tensor_name(name):
        raise CorruptCheckpoint(f"the safetensors header has a bad tensor name: {name[:80]!r}")
    dtype = DTYPE_OF_SAFETENSORS.get(entry.dtype)
    if dtype is None:
        raise InvalidRequest(f"tensor {name!r} has dtype {entry.dtype[:40]!r}: not supported")
    shape = _torch_shape(name, entry)
    begin, end = entry.data_offsets
    if not 0 <= begin <= end < 2**63:
        raise CorruptCheckpoint(f"tensor {name!r} has impossible data_offsets")
    if end - begin != math.prod(shape) * DTYPE_BYTES[dtype]:
        raise CorruptCheckpoint(f"tensor {name!r} has a size that is not its shape times its dtype")
    return SourceTensor(name, dtype, shape, start + begin, end - begin)


def _torch_shape(name: str, entry: _Entry) -> tuple[int, ...]:
    shape = entry.shape
    if len(shape) > MAX_RANK or not all(0 <= length < 2**47 for length in shape):
        raise CorruptCheckpoint(f"tensor {name!r} has an impossible shape")
    if entry.dtype != "F4":
        return shape
    if not shape or shape[-1] % 2:
        raise CorruptCheckpoint(f"tensor {name!r} of half bytes ends in half a byte")
    return (*shape[:-1], shape[-1] // 2)


def _check_cover(tensors: list[SourceTensor], start: int, file_bytes: int) -> None:
    end = start
    for tensor in tensors:
        if tensor.offset_bytes != end:
            kind = "overlaps another" if tensor.offset_bytes < end else "leaves a hole before it"
            raise CorruptCheckpoint(f"tensor {tensor.name!r} {kind}")
        end += tensor.size_bytes
    if end != file_bytes:
        kind = "is truncated" if end > file_bytes else "has bytes behind its last tensor"
        raise CorruptCheckpoint(
            f"the safetensors file {kind}: {file_bytes} bytes where its header says {end}"
        )
