"""How far predictions of starts were off, and how far repeats of one start are from each other."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from statistics import median
from typing import Protocol


class TimedStart(Protocol):
    """A start with what it is a repeat of."""

    @property
    def model(self) -> str:
        """Its name."""
        ...

    @property
    def tier(self) -> str:
        """Where its bytes were."""
        ...

    @property
    def beside(self) -> int:
        """Other starts in the same moment."""
        ...

    @property
    def predicted_s(self) -> float:
        """Expected seconds."""
        ...

    @property
    def measured_s(self) -> float:
        """Seconds."""
        ...

    @property
    def waited_s(self) -> float:
        """Of these, behind other loads."""
        ...


def errors(starts: Iterable[TimedStart]) -> Sequence[float]:
    """Return |predicted - measured| / measured of each."""
    return [abs(each.predicted_s - each.measured_s) / each.measured_s for each in starts]


def noise_floor(starts: Iterable[TimedStart]) -> Sequence[float]:
    """Return how far the median of its repeats is from each start, relative to it.

    A repeat is the same model out of the same tier with as many starts beside it. The time that it
    waited behind other loads is left out: it is another one in each round. An estimator that knew
    all repeats but the one to come, those after it too, would be off by this much.
    """
    repeats: dict[tuple[str, str, int], list[float]] = defaultdict(list)
    for each in starts:
        key = (each.model, each.tier, each.beside)
        repeats[key].append(each.measured_s - each.waited_s)
    return [
        abs(median(others) - took_s) / took_s
        for times in repeats.values()
        for number, took_s in enumerate(times)
        if (others := times[:number] + times[number + 1 :])
    ]
