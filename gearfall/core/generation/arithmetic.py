"""How products with a model's weights are computed on a CPU: what a token's bits hang on."""

from enum import Enum


class Arithmetic(Enum):
    """What becomes of activations before they are multiplied with bfloat16 weights.

    Weights of other kinds are multiplied in float32 either way. Under each of them a token's bits
    hang on nothing but the model and the tokens before it; docs/decisions/0012 compares the two.
    """

    EXACT = "exact"
    """They stay float32."""
    BF16 = "bf16"
    """They are rounded to bfloat16, as transformers does; sums stay float32."""
