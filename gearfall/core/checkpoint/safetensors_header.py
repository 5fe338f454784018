"""The header of a safetensors file, parsed with every byte held hostile.

A file is an 8-byte little-endian header length n, n bytes of JSON, and the tensors' bytes, which
must cover the rest of the file without a hole or an overlap.
"""

import math
import struct
from dataclasses import dataclass

import msgspec
import numpy as np

from gearfall.core.checkpoint.dtypes import DTYPE_BYTES, DTYPE_OF_SAFETENSORS
from gearfall.core.checkpoint.manifest import MAX_RANK, is_tensor_name
from gearfall.core.errors import CorruptCheckpoint, InvalidRequest

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 16 * 2**20
MAX_HEADER_TENSORS = 100_000
_MAX_METADATA_BYTES = 2**20
_MAX_SHAPE_BYTES = 512
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
    shape: msgspec.Raw
    """Decoded only once it is known to be short."""
    data_offsets: tuple[int, int]


class _Metadata(msgspec.Struct):
    """All that a first pass takes from a header; everything else is skipped, not stored."""

    text: msgspec.Raw = msgspec.field(default=msgspec.Raw(b""), name=_METADATA)


_NO_ENTRY = b'{"dtype":"","shape":[],"data_offsets":[0,0]}'
"""Stands in for the metadata, so that every value of the header is decoded as an entry."""


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
        metadata_text, rest = _take_metadata(header)
        metadata = msgspec.json.decode(metadata_text, type=dict[str, str] | None) or {}
        if rest.count(b"{") > MAX_HEADER_TENSORS + 2:
            raise CorruptCheckpoint(
                f"the safetensors header lists more than {MAX_HEADER_TENSORS} tensors"
            )
        entries = msgspec.json.decode(rest, type=dict[str, _Entry])
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpoint(f"the safetensors header does not decode: {error}") from None
    entries.pop(_METADATA, None)
    start = LENGTH_BYTES + len(header)
    tensors = [_to_tensor(name, entry, start) for name, entry in entries.items()]
    tensors.sort(key=lambda tensor: (tensor.offset_bytes, tensor.size_bytes))
    _check_cover(tensors, start, file_bytes)
    return SafetensorsHeader(tuple(tensors), metadata, start)


def _take_metadata(header: bytes) -> tuple[bytes, bytes]:
    """Return the metadata's JSON and the header with a stand-in for it.

    An entry has fields that it must have and the metadata has none of them, so the header decodes
    as entries alone without it: a header full of anything else fails at its first value.
    """
    raw = memoryview(msgspec.json.decode(header, type=_Metadata).text)
    if not raw:
        return b"null", header
    if len(raw) > _MAX_METADATA_BYTES:
        raise CorruptCheckpoint(f"the safetensors metadata takes {len(raw)} bytes")
    start = _address(raw) - _address(memoryview(header))
    text = bytes(raw)
    assert header[start : start + len(text)] == text
    return text, header[:start] + _NO_ENTRY + header[start + len(text) :]


def _address(view: memoryview) -> int:
    address: int = np.frombuffer(view, dtype=np.uint8).ctypes.data
    return address


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
    shape = _decode_shape(name, entry.shape)
    if len(shape) > MAX_RANK or not all(0 <= length < 2**47 for length in shape):
        raise CorruptCheckpoint(f"tensor {name!r} has an impossible shape")
    if entry.dtype != "F4":
        return shape
    if not shape or shape[-1] % 2:
        raise CorruptCheckpoint(f"tensor {name!r} of half bytes ends in half a byte")
    return (*shape[:-1], shape[-1] // 2)


def _decode_shape(name: str, raw: msgspec.Raw) -> tuple[int, ...]:
    text = memoryview(raw)
    if len(text) > _MAX_SHAPE_BYTES:
        raise CorruptCheckpoint(f"tensor {name!r} has an impossible shape")
    try:
        return msgspec.json.decode(text, type=tuple[int, ...])
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpoint(f"the shape of {name!r} does not decode: {error}") from None


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
