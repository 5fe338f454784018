"""The sizes of the demo family: what each model's shape is and what one token costs."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

HEAD_DIM = 32
MAX_TOKENS = 256
ROTARY_BASE = 1000.0
BYTES_PER_PARAMETER = 2


@dataclass(frozen=True, slots=True)
class Size:
    """The shape of one Llama model of the family and how long it is trained."""

    name: str
    width: int
    layers: int
    feed_forward: int
    steps: int
    """Training steps of up to 512 questions each."""

    @property
    def heads(self) -> int:
        """Attention heads, each of 32; keys and values have as many."""
        return self.width // HEAD_DIM

    @property
    def body_parameters(self) -> int:
        """Parameters apart from the (tied) token embedding."""
        matrices = 4 * self.width**2 + 3 * self.width * self.feed_forward
        return self.layers * (matrices + 2 * self.width) + self.width

    @property
    def flops_per_token(self) -> int:
        """Floating-point operations for one token: 2 x parameters without the embedding.

        The usual estimate (Kaplan et al. 2020, section 2.1) without its attention term, which at
        23 tokens is small.
        """
        return 2 * self.body_parameters

    @property
    def weight_bytes_per_token(self) -> int:
        """Bytes of bfloat16 weights read to decode one token of an unbatched sequence."""
        return BYTES_PER_PARAMETER * self.body_parameters


SIZES: Mapping[str, Size] = MappingProxyType(
    {
        size.name: size
        for size in (
            Size("arith-small", width=32, layers=3, feed_forward=96, steps=1200),
            Size("arith-medium", width=96, layers=4, feed_forward=256, steps=1200),
            Size("arith-large", width=192, layers=6, feed_forward=512, steps=1100),
        )
    }
)
"""Smallest first, which is also the order of the cascade."""
