"""Keys of known KV blocks: what was computed, and for whom. Pure.

A key is a chain: blake2b(key of the block before, tokens of the block). The first link is made of
tenant and adapter, so that neither learns from the other's cache, not even by its timing.
"""

from array import array
from collections.abc import Sequence
from hashlib import blake2b

from services.worker.engine.batching.kv_blocks import BLOCK_TOKENS

_KEY_BYTES = 16
"""Two different prefixes meet by chance once in 2^64 blocks."""


def root_key(tenant: str, adapter: str) -> bytes:
    """Return the link before the first block of whoever has this tenant and adapter."""
    digest = blake2b(digest_size=_KEY_BYTES)
    for part in (tenant.encode(), adapter.encode()):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()


def extend_keys(keys: list[bytes], tokens: Sequence[int], full_blocks: int) -> None:
    """Append to `keys` (the root first) until there is one for each of `full_blocks` blocks."""
    for block in range(len(keys) - 1, full_blocks):
        part = tokens[block * BLOCK_TOKENS : (block + 1) * BLOCK_TOKENS]
        keys.append(
            blake2b(array("q", part).tobytes(), digest_size=_KEY_BYTES, key=keys[-1]).digest()
        )
