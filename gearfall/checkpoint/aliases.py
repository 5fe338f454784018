"""Finds the tensors of a source that need no bytes of their own."""

import os

from gearfall.checkpoint.layout import load_order
from gearfall.checkpoint.source import Source, SourceFile
from gearfall.core.checkpoint.manifest import checksum
from gearfall.core.checkpoint.safetensors_header import SourceTensor

_SAMPLE_BYTES = 4096
_PIECE_BYTES = 2**20
_MAX_LOOKALIKES = 4
"""Keeps a checkpoint made of near-equal tensors from costing a comparison for each pair."""

_Located = tuple[SourceFile, SourceTensor]


def find_aliases(source: Source, located: dict[str, _Located]) -> dict[str, str]:
    """Return name -> stored name for noted ties, and for tensors equal to an earlier one.

    Only tensors that ranks share in the same way count as equal. Reads samples of every tensor and
    the whole of those whose samples agree.
    """
    aliases: dict[str, str] = {}
    first_of: dict[object, list[str]] = {}
    for name in load_order(located):
        file, tensor = located[name]
        if tensor.size_bytes == 0:
            continue
        likeness = (source.rules.splits.get(name), _likeness(file, tensor))
        candidates = first_of.setdefault(likeness, [])
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
