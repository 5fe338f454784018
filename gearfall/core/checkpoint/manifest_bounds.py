"""What a manifest may ask a reader to allocate, known before anything of it is decoded.

JSON of two bytes can become an object of a hundred. So the sections of a manifest are measured as
they stand, by their length and by marks that each element needs: refusing a hostile one then costs
no more memory than reading a sound one of its size.
"""

import msgspec

from gearfall.core.checkpoint.manifest_checks import require
from gearfall.core.checkpoint.manifest_entries import (
    FORMAT,
    FORMAT_VERSION,
    MAX_CHUNKS,
    MAX_MANIFEST_BYTES,
    MAX_PARTITIONS,
    MAX_SECTIONS,
    MAX_TENSORS,
)
from gearfall.core.errors import CorruptCheckpoint

_NOTHING = msgspec.Raw(b"null")
_MAX_SECTION_BYTES = {
    "model": 64 * 1024,
    "adapter": 4096,
    "files": 64 * 1024,
    "source_files": 2 * 2**20,
    "source_revision": 1024,
}
_MAX_OBJECTS_OF_A_TENSOR = 2 + MAX_SECTIONS
"""The entry, its split, and the sections."""
_MAX_COMMAS_OF_AN_OBJECT = 24
"""A tensor has seven fields and up to sixteen lengths."""


class _Sections(msgspec.Struct):
    """A manifest's sections, undecoded: views of its bytes."""

    format: str
    format_version: int
    model: msgspec.Raw = _NOTHING
    adapter: msgspec.Raw = _NOTHING
    partitions: msgspec.Raw = _NOTHING
    tensors: msgspec.Raw = _NOTHING
    aliases: msgspec.Raw = _NOTHING
    files: msgspec.Raw = _NOTHING
    source_files: msgspec.Raw = _NOTHING
    source_revision: msgspec.Raw = _NOTHING


def check_bounds(content: bytes) -> None:
    """Raise CorruptCheckpoint for a manifest of another version or beyond every bound."""
    require(len(content) <= MAX_MANIFEST_BYTES, "is larger than any real one")
    try:
        sections = msgspec.json.decode(content, type=_Sections)
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpoint(f"the manifest does not decode: {error}") from None
    require(sections.format == FORMAT, "is not of the gearfall format")
    require(
        sections.format_version == FORMAT_VERSION,
        f"has format_version {str(sections.format_version)[:20]}; "
        f"this gearfall reads {FORMAT_VERSION}",
    )
    for name, max_bytes in _MAX_SECTION_BYTES.items():
        size_bytes = len(memoryview(getattr(sections, name)))
        require(size_bytes <= max_bytes, f"says too much in {name}", size_bytes)
    _check_partitions(bytes(sections.partitions))
    _check_tensors(bytes(sections.tensors))
    require(bytes(sections.aliases).count(b"{") <= MAX_TENSORS, "has too many aliases")


def _check_partitions(text: bytes) -> None:
    require(text.count(b"{") <= MAX_PARTITIONS, "has too many partitions")
    require(text.count(b",") <= MAX_CHUNKS + 8 * MAX_PARTITIONS, "has too many chunks")


def _check_tensors(text: bytes) -> None:
    tensors = text.count(b'"offset_bytes"')
    require(tensors <= MAX_TENSORS, "has too many tensors")
    objects = text.count(b"{")
    require(objects <= _MAX_OBJECTS_OF_A_TENSOR * tensors, "has a tensor with too many sections")
    commas = text.count(b",")
    require(commas <= _MAX_COMMAS_OF_AN_OBJECT * objects, "has a tensor with a bad shape")
