"""What starts cost: stages whose model went away since it was last asked.

A replica leaves when nobody asked it for `keep_alive_s`. Requests come to a stage at random times
(Poisson), so that one finds the model gone with probability exp(-rate x keep_alive_s). While it
starts, its worker could have computed: a start costs what the model computes in that time.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StartTerms:
    """What starting one model takes."""

    start_s: float
    """From the tier that its bytes are in."""
    cost_per_s: float
    """Of computing with it, in the profile's unit."""


@dataclass(frozen=True, slots=True)
class Warmth:
    """How long models stay."""

    keep_alive_s: float
    """Without a request; infinite: nobody leaves, and no start is paid for."""
    terms: Mapping[str, StartTerms]
    """By model."""

    def start_cost(
        self, models: Sequence[str], reached: Sequence[float], requests_per_s: float
    ) -> float:
        """Return the mean cost a request of the starts that its stages wait for.

        models, reached: of each stage, and the share of requests that come to it.
        """
        if math.isinf(self.keep_alive_s):
            return 0.0
        return math.fsum(
            share
            * math.exp(-share * requests_per_s * self.keep_alive_s)
            * self.terms[model].start_s
            * self.terms[model].cost_per_s
            for model, share in zip(models, reached, strict=True)
            if share > 0.0
        )


ALWAYS_WARM = Warmth(math.inf, {})
