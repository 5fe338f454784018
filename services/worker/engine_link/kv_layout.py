"""Where the keys and values of a block lie in an engine's KV memory. Pure.

A layer's keys are one array [total_blocks, block_tokens, kv_heads, head_dim] at `keys_offset`, its
values another at `values_offset`; so block b's keys are the `block_bytes` bytes from
`keys_offset + b * block_bytes`, and a token's are a contiguous part of them.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class KvLayer:
    """One layer's place in the memory, in bytes from its start."""

    keys_offset: int
    values_offset: int
    block_bytes: int
    """Bytes of one block's keys; its values have as many."""


@dataclass(frozen=True, slots=True)
class KvRange:
    """Consecutive bytes of the memory."""

    offset: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class KvLayout:
    """All layers of one engine's cache. Two engines of one checkpoint differ in offsets only."""

    total_blocks: int
    block_tokens: int
    size_bytes: int
    """Of the whole memory."""
    layers: tuple[KvLayer, ...]

    @property
    def block_bytes(self) -> int:
        """Bytes of one block in all layers, keys and values."""
        return sum(2 * layer.block_bytes for layer in self.layers)

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in all layers, keys and values."""
        return self.block_bytes // self.block_tokens

    def ranges(self, block: int, tokens: int | None = None) -> tuple[KvRange, ...]:
        """Return where the first `tokens` (by default all) of a block lie.

        Keys, then values, layer by layer: the order in which a block's bytes travel.
        """
        assert 0 <= block < self.total_blocks
        count = self.block_tokens if tokens is None else tokens
        assert 0 <= count <= self.block_tokens
        return tuple(
            KvRange(
                start + block * layer.block_bytes, layer.block_bytes * count // self.block_tokens
            )
            for layer in self.layers
            for start in (layer.keys_offset, layer.values_offset)
        )
