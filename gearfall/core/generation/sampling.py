"""How the next token is drawn, with the limits that a request must keep."""

import math
from dataclasses import dataclass

from gearfall.core.errors import InvalidRequest

MAX_TOP_LOGPROBS = 20
MAX_STOP_TOKENS = 64


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling of one job. The random stream depends on (seed, token index) alone."""

    max_tokens: int
    """Most tokens to generate, >= 1, resumed ones included."""
    temperature: float = 1.0
    """0 is greedy; else logits are divided by it. In [0, 2]."""
    top_p: float = 1.0
    """Nucleus mass in (0, 1]."""
    top_k: int = 0
    """Most likely tokens kept; 0 keeps all."""
    seed: int = 0
    """64-bit key of the counter-based random stream."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the generation; the model's end-of-sequence tokens included."""
    top_logprobs: int = 0
    """Alternatives reported for each token, 0 to 20."""
    ignore_eos: bool = False
    """Go on past `stop_token_ids`."""

    def __post_init__(self) -> None:
        _require(self.max_tokens >= 1, "max_tokens", self.max_tokens, "at least 1")
        _require(
            math.isfinite(self.temperature) and 0.0 <= self.temperature <= 2.0,
            "temperature",
            self.temperature,
            "between 0 and 2",
        )
        _require(
            math.isfinite(self.top_p) and 0.0 < self.top_p <= 1.0,
            "top_p",
            self.top_p,
            "above 0 and at most 1",
        )
        _require(self.top_k >= 0, "top_k", self.top_k, "at least 0")
        _require(0 <= self.seed < 2**64, "seed", self.seed, "between 0 and 2^64 - 1")
        _require(
            0 <= self.top_logprobs <= MAX_TOP_LOGPROBS,
            "top_logprobs",
            self.top_logprobs,
            f"between 0 and {MAX_TOP_LOGPROBS}",
        )
        _require(
            len(self.stop_token_ids) <= MAX_STOP_TOKENS,
            "stop_token_ids",
            len(self.stop_token_ids),
            f"at most {MAX_STOP_TOKENS} tokens",
        )

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0.0


def _require(holds: bool, param: str, value: object, rule: str) -> None:
    if not holds:
        raise InvalidRequest(f"{param} must be {rule}, not {value}", param=param)
