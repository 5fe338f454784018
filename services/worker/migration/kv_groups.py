"""Groups of blocks: how keys and values travel from one engine's memory into another's.

A group is a header, first and last token (end exclusive) and xxh3_64 of the bytes, then the bytes,
block by block in the order of `KvLayout.ranges`. The target answers each group that lies in its
blocks with its end; so many groups as the window allows may be unanswered.
"""

import struct
from collections.abc import Iterator

from gearfall.core.errors import Unavailable
from gearfall.pb import worker_pb2 as pb
from services.worker.engine_link.kv_layout import KvLayout

GROUP_BYTES = 1 << 20
"""About as many bytes as one group has; at least one block."""
WINDOW_GROUPS = 8
HEADER = struct.Struct("<IIQ")
ANSWER = struct.Struct("<I")


def kv_shape(layout: KvLayout) -> pb.KvShape:
    """Return what two caches must have in common for their blocks to be interchangeable."""
    return pb.KvShape(
        block_tokens=layout.block_tokens,
        layer_block_bytes=[layer.block_bytes for layer in layout.layers],
    )


def groups_of(start: int, end: int, layout: KvLayout) -> Iterator[tuple[int, int]]:
    """Part tokens [start, end) into groups of whole blocks; the last block may be cut short."""
    assert start % layout.block_tokens == 0
    size = max(1, GROUP_BYTES // layout.block_bytes) * layout.block_tokens
    for first in range(start, end, size):
        yield first, min(first + size, end)


def parts_of(start: int, end: int, block_tokens: int) -> Iterator[tuple[int, int]]:
    """Yield (place in the block table, tokens in that block) of tokens [start, end)."""
    for first in range(start, end, block_tokens):
        yield first // block_tokens, min(block_tokens, end - first)


def unpack_group(message: bytes, layout: KvLayout) -> tuple[int, int, int, memoryview]:
    """Return first and last token, checksum and bytes of a group that came whole.

    Raises Unavailable where it is none.
    """
    if len(message) < HEADER.size:
        raise Unavailable("a group without a header")
    start, end, checksum = HEADER.unpack_from(message)
    content = memoryview(message)[HEADER.size :]
    if len(content) != check_group(start, end, layout):
        raise Unavailable(f"a group of tokens {start} to {end} has {len(content)} bytes")
    return start, end, checksum, content


def check_group(start: int, end: int, layout: KvLayout) -> int:
    """Return how many bytes a group has. Raises Unavailable where there can be none such."""
    limit = layout.total_blocks * layout.block_tokens
    if start % layout.block_tokens or not start < end <= limit:
        raise Unavailable(f"a group of tokens {start} to {end} makes no sense")
    parts = parts_of(start, end, layout.block_tokens)
    return sum(tokens * layout.token_bytes for _, tokens in parts)
