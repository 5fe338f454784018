"""Lower bounds on the entropy of a next token, from the few alternatives that an engine records.

The k likeliest tokens with probabilities p_1 >= ... >= p_k are known; what is left, r, is shared by
tokens of at most p_k each, so that each of them adds at least its share of -log p_k:

    H >= -sum_i p_i log p_i - r log p_k,    r = 1 - sum_i p_i

Equality where the rest is made of tokens as likely as the last known one. With k = 2 this needs the
log-probability and the margin that every stage records anyway; more alternatives tighten it.
"""

import math
from collections.abc import Sequence


def entropy_bound(top_logprobs: Sequence[float]) -> float:
    """Return the bound in nats, not negative. `top_logprobs`: falling, one or more, at most 0."""
    known = [(math.exp(each), each) for each in top_logprobs]
    rest = max(0.0, 1.0 - math.fsum(share for share, _ in known))
    spent = math.fsum(share * each for share, each in known if share > 0.0)
    if rest <= 0.0:
        return max(0.0, -spent)
    return max(0.0, -spent - rest * min(0.0, top_logprobs[-1]))


def pair_entropy(logprob: float, margin: float) -> float:
    """Return the bound for a token that was the likeliest, from its lead over the second.

    A token that was drawn and was not the likeliest counts as if it had been: as less certain.
    """
    if math.isnan(logprob) or math.isnan(margin):
        return math.nan
    return entropy_bound((min(0.0, logprob), min(0.0, logprob) - max(0.0, margin)))
