"""Whether a share of answers still is what a plan promised, asked after every single answer.

A watch sees a row of yes and no and holds against it that at most `most` of them are yes. It bets
on a few larger shares: under one of them an answer is p1 / most times as likely if yes, and
(1 - p1) / (1 - most) times if no. While the promise holds, each such ratio is 1 on average or less,
whatever came before. The Shiryaev-Roberts sums R <- (R + 1) x ratio, mixed evenly over the bets,
are an e-detector (Shin, Ramdas, Rinaldo, arXiv 2203.03532): R minus the number of answers falls on
average, so that as long as the promise holds it takes at least A answers on average until R >= A.
A is the rate of false alarms that is stated; nothing is assumed about how the share varies below
`most`, and there is no number of answers to wait for.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from gearfall.core.gears.gear_records import DriftRecord
from gearfall.core.records import Stage

ODDS = (1.5, 2.0, 4.0, 8.0)
"""Bets: how many times larger the odds of yes may have become."""
TOLERANCE_DELTA = 0.01
"""Chance that a promise measured on n queries is off by more than `tolerance(n)`."""
MIN_TOLERANCE, MAX_TOLERANCE = 0.01, 0.25
UNKNOWN_TOLERANCE = 0.1
"""Around a promise that does not say how many queries it stands on."""
_LEAST = 1e-3
MIN_RECENT = 20
"""Compared answers that a threshold is chosen on, at the least."""


@dataclass(frozen=True, slots=True)
class ShareWatch:
    """What one watch remembers."""

    most: float
    """Promised share of yes, at most, in (0, 1)."""
    sums: tuple[float, ...] = (0.0,) * len(ODDS)
    answers: int = 0
    yes: int = 0

    @property
    def evidence(self) -> float:
        """R: an alarm at A has a false one in A answers on average, or more seldom."""
        return sum(self.sums) / len(self.sums)

    @property
    def share(self) -> float:
        """Of yes so far; 0 before the first answer."""
        return self.yes / self.answers if self.answers else 0.0


def watch_share(most: float) -> ShareWatch:
    """Return a watch that has seen nothing; `most` is moved into what can be bet against."""
    return ShareWatch(min(max(most, _LEAST), 1.0 - _LEAST))


def seen(watch: ShareWatch, is_yes: bool) -> ShareWatch:
    """Return the watch after one more answer."""
    sums = tuple(
        (each + 1.0) * bet_ratio(watch.most, odds, is_yes)
        for each, odds in zip(watch.sums, ODDS, strict=True)
    )
    return replace(watch, sums=sums, answers=watch.answers + 1, yes=watch.yes + is_yes)


def bet_ratio(most: float, odds: float, is_yes: bool) -> float:
    """Return how much likelier an answer is when the odds of yes are `odds` times those of `most`.

    Its mean is 1 at a share of `most` and lower below it.
    """
    larger = odds * most / (1.0 - most + odds * most)
    return larger / most if is_yes else (1.0 - larger) / (1.0 - most)


def tolerance(queries: float) -> float:
    """Return how far a share measured on so many queries may be off (Hoeffding, both sides)."""
    if queries < 1:
        return UNKNOWN_TOLERANCE
    off = math.sqrt(math.log(2.0 / TOLERANCE_DELTA) / (2.0 * queries))
    return min(max(off, MIN_TOLERANCE), MAX_TOLERANCE)


def cascade_name(stages: Sequence[Stage]) -> str:
    """Return a cascade in one word: `small:0.8,large`, `small*3:0.5,large` where three answers are
    compared. Gears with the same one are one to watch."""
    return ",".join(
        str(each) if each.threshold is None else f"{each}:{each.threshold!r}" for each in stages
    )


def deployment_of(record: DriftRecord) -> tuple[float, int]:
    """Return what differs for every plan that is deployed, and grows."""
    return record.deployed_unix_s, record.version


def joined(one: DriftRecord, other: DriftRecord) -> DriftRecord:
    """Return what two findings about one cascade come to, whichever came first.

    Of one plan: the higher thresholds, and the newest alarm of each promise and stage. Of two: the
    findings about the one that was deployed last.
    """
    if deployment_of(one) != deployment_of(other):
        return max(one, other, key=deployment_of)
    alarms = {
        (each.promise, each.stage): each
        for each in sorted(
            (*one.alarms, *other.alarms), key=lambda each: (each.at_unix_s, each.reason)
        )
    }
    pairs = zip(one.thresholds, other.thresholds, strict=True)
    return replace(
        one,
        thresholds=tuple(max(pair) for pair in pairs),
        times=max(one.times, other.times),
        alarms=tuple(alarms[key] for key in sorted(alarms)),
    )


@dataclass(frozen=True, slots=True)
class Compared:
    """An accepted answer of a lower stage that the last stage was asked for as well."""

    certainty: float
    agreed: bool


def since_change(compared: Sequence[Compared], most: float) -> Sequence[Compared]:
    """Return the newest answers from the likeliest change on: before it all was as promised.

    `most`: promised share of disagreement. Of all suffixes of at least MIN_RECENT answers the one
    whose disagreement is the least likely under the promise (generalised likelihood ratio).
    """
    best, best_score, disagreed = len(compared), -1.0, 0
    for count, each in enumerate(reversed(compared), start=1):
        disagreed += not each.agreed
        score = count * _divergence(disagreed / count, most)
        if count >= min(MIN_RECENT, len(compared)) and score > best_score:
            best, best_score = count, score
    return compared[len(compared) - best :]


def tightened(compared: Sequence[Compared], threshold: float, most: float) -> float:
    """Return a threshold above `threshold` that keeps the promise on answers compared lately.

    The lowest at which at most `most` of the answers that would still be accepted disagreed; but
    none that sends up more than half of them at once, if there is one: an alarm that comes back
    moves it further. At most 1, which is returned when there is nothing above `threshold`.
    """
    certainties = sorted({each.certainty for each in compared if each.certainty > threshold})
    above = math.nextafter(max((each.certainty for each in compared), default=1.0), math.inf)
    candidates = [*certainties, above]
    bounded = [
        each
        for each in candidates
        if 2 * sum(one.certainty >= each for one in compared) >= len(compared)
    ]
    chosen = (bounded or candidates[:1])[-1]
    for candidate in bounded:
        left = [each for each in compared if each.certainty >= candidate]
        if sum(not each.agreed for each in left) <= most * len(left):
            chosen = candidate
            break
    return min(max(chosen, threshold), 1.0)


def _divergence(share: float, most: float) -> float:
    """Return the Kullback-Leibler divergence of a larger share from `most`; 0 for a smaller one."""
    most = min(max(most, _LEAST), 1.0 - _LEAST)
    if share <= most:
        return 0.0
    rest = (1.0 - share) * math.log((1.0 - share) / (1.0 - most)) if share < 1.0 else 0.0
    return share * math.log(share / most) + rest
