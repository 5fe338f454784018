"""Where each tensor goes in a converted checkpoint: load order, alignment, padding. Pure."""

import re
from collections.abc import Iterable, Mapping, Sequence

from gearfall.core.checkpoint.manifest import PAGE_BYTES, TENSOR_ALIGNMENT_BYTES, TensorEntry
from gearfall.core.checkpoint.manifest_split import Split
from gearfall.core.checkpoint.safetensors_header import SourceTensor

CHUNK_BYTES = 4 * 2**20
LARGE_TENSOR_BYTES = 2**20
"""From this size on a tensor starts on a page, so that it can be read directly or mapped alone; the
padding stays below 0.4 percent. Many smaller ones cost little at TENSOR_ALIGNMENT_BYTES."""
REPLICATED_MAX_BYTES = 2**20
"""A tensor that ranks don't share lies in every partition up to this size, so that a rank reads its
own partition only; a larger one lies in partition 0 alone."""

_EMBEDDING = re.compile(r"(?:^|[._])(?:embed|wte|wpe|word_embeddings|embedding)")
_DIGITS = re.compile(r"(\d+)")


def load_order(names: Iterable[str]) -> list[str]:
    """Sort names as a forward pass needs them: embeddings, layers by number, norm and head."""
    return sorted(names, key=_load_key)


def _load_key(name: str) -> tuple[int, list[tuple[int, int, str]]]:
    parts = _DIGITS.split(name)
    natural = [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in parts]
    if len(parts) > 1:
        return 1, natural
    return (0 if _EMBEDDING.search(name) else 2), natural


def place(
    tensors: Sequence[SourceTensor],
    partition: int = 0,
    splits: Mapping[str, Split] | None = None,
) -> tuple[list[TensorEntry], int]:
    """Pack tensors into one partition in the order given; return entries and the padded size.

    `splits`: what the shapes are parts of, by name.
    """
    entries = []
    end = 0
    for tensor in tensors:
        offset = align(end, tensor_alignment(tensor.size_bytes))
        split = (splits or {}).get(tensor.name)
        size_bytes = tensor.size_bytes
        entries.append(
            TensorEntry(
                tensor.name, tensor.dtype, tensor.shape, partition, offset, size_bytes, split
            )
        )
        end = offset + tensor.size_bytes
    return entries, max(PAGE_BYTES, align(end, PAGE_BYTES))


def tensor_alignment(size_bytes: int) -> int:
    """Return what a tensor's offset must be a multiple of."""
    return PAGE_BYTES if size_bytes >= LARGE_TENSOR_BYTES else TENSOR_ALIGNMENT_BYTES


def align(offset_bytes: int, alignment_bytes: int) -> int:
    """Round up to a multiple of `alignment_bytes`."""
    return -(-offset_bytes // alignment_bytes) * alignment_bytes
