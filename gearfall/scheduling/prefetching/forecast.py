"""How likely a model is wanted soon, from when it was wanted before: four forecasts, side by side.

- *EWMA*: arrivals as a Poisson process of the rate lately, sum(e^(-age / window)) / window.
- *Seasonal-naive*: what came in the same span one season ago comes again.
- *Gaps*: of past silences that had lasted as long as the present one, the share that ended within
  the horizon; until there are enough of them the EWMA stands in (it counts as one more silence).
  The histogram of silences is that of serverless functions' keep-alive (Shahrad et al., ATC 2020).
- *Blend*: the mean of gaps and season; of gaps alone before a whole season was seen.

A history has constant size. Which forecast the fleet runs on was chosen by replaying real arrivals:
docs/decisions/0014.
"""

import bisect
import math
from dataclasses import dataclass, replace
from enum import Enum

EWMA_WINDOW_S = 600.0
DAY_S = 86_400.0
SEASON_SLOTS = 96
"""A quarter of an hour each where the season is a day."""
GAP_EDGES_S: tuple[float, ...] = tuple(2.0 ** (step / 2) for step in range(34))
"""Upper ends of the histogram's bins, from 1 s to a day; longer silences fall into the last."""
GAP_MEMORY = 0.97
"""What a silence in the histogram is worth after one more: about 30 of them count."""
_NO_GAPS = (0.0,) * len(GAP_EDGES_S)
_NO_SEASON = (0.0,) * SEASON_SLOTS


class Forecast(Enum):
    """Which of them."""

    EWMA = "ewma"
    SEASONAL = "seasonal"
    GAPS = "gaps"
    BLEND = "blend"


@dataclass(frozen=True, slots=True)
class ArrivalHistory:
    """When jobs came for one model; the empty one is of a model nobody ever asked for."""

    first_unix_s: float = 0.0
    """When the first one came; 0 for never."""
    last_unix_s: float = 0.0
    """When one last came; 0 for never."""
    rate_per_s: float = 0.0
    """Over EWMA_WINDOW_S, as it was at `last_unix_s`."""
    gaps: tuple[float, ...] = _NO_GAPS
    """Silences that ended, by length, each worth less the older it is."""
    slot: int = 0
    """Number of the season's slot that `last_unix_s` falls into, counted from 1970."""
    slot_jobs: float = 0.0
    """Arrivals in that slot."""
    season: tuple[float, ...] = _NO_SEASON
    """Arrivals in each slot when it was last over, by slot number modulo SEASON_SLOTS."""


def note_arrivals(
    history: ArrivalHistory, jobs: int, at_unix_s: float, *, season_s: float = DAY_S
) -> ArrivalHistory:
    """Return the history with `jobs` that came at `at_unix_s`, no earlier than those before."""
    if jobs <= 0:
        return history
    at_unix_s = max(at_unix_s, history.last_unix_s)
    elapsed_s = at_unix_s - history.last_unix_s
    is_first = history.last_unix_s <= 0.0
    history = _rolled(history, math.floor(at_unix_s / (season_s / SEASON_SLOTS)), is_first)
    return replace(
        history,
        first_unix_s=at_unix_s if is_first else history.first_unix_s,
        last_unix_s=at_unix_s,
        rate_per_s=_rate(history, at_unix_s) + jobs / EWMA_WINDOW_S,
        gaps=history.gaps if is_first else _with_gap(history.gaps, elapsed_s),
        slot_jobs=history.slot_jobs + jobs,
    )


def use_probability(
    history: ArrivalHistory,
    forecast: Forecast,
    horizon_s: float,
    now_unix_s: float,
    *,
    season_s: float = DAY_S,
) -> float:
    """Return how likely at least one job comes within `horizon_s` from now, in [0, 1]."""
    if history.last_unix_s <= 0.0 or horizon_s <= 0.0:
        return 0.0
    match forecast:
        case Forecast.EWMA:
            return _at_least_one(_expected_by_rate(history, horizon_s, now_unix_s))
        case Forecast.SEASONAL:
            return _at_least_one(_expected_by_season(history, horizon_s, now_unix_s, season_s))
        case Forecast.GAPS:
            return _by_gaps(history, horizon_s, now_unix_s)
        case Forecast.BLEND:
            by_gaps = _by_gaps(history, horizon_s, now_unix_s)
            if now_unix_s - history.first_unix_s < season_s:
                return by_gaps
            expected = _expected_by_season(history, horizon_s, now_unix_s, season_s)
            return (by_gaps + _at_least_one(expected)) / 2


def _at_least_one(expected: float) -> float:
    return -math.expm1(-expected)


def _rate(history: ArrivalHistory, at_unix_s: float) -> float:
    age_s = max(0.0, at_unix_s - history.last_unix_s)
    return history.rate_per_s * math.exp(-age_s / EWMA_WINDOW_S)


def _expected_by_rate(history: ArrivalHistory, horizon_s: float, now_unix_s: float) -> float:
    return _rate(history, now_unix_s) * horizon_s


def _expected_by_season(
    history: ArrivalHistory, horizon_s: float, now_unix_s: float, season_s: float
) -> float:
    slot_s = season_s / SEASON_SLOTS
    begin, end = now_unix_s / slot_s, (now_unix_s + min(horizon_s, season_s)) / slot_s
    expected = 0.0
    for slot in range(math.floor(begin), math.ceil(end)):
        share = min(end, slot + 1.0) - max(begin, float(slot))
        expected += share * _jobs_a_season_before(history, slot)
    return expected


def _jobs_a_season_before(history: ArrivalHistory, slot: int) -> float:
    """Return what came in the slot one season before `slot`."""
    before = slot - SEASON_SLOTS
    if before > history.slot:
        return 0.0
    if before == history.slot:
        return history.slot_jobs
    return history.season[before % SEASON_SLOTS] if before > history.slot - SEASON_SLOTS else 0.0


def _rolled(history: ArrivalHistory, slot: int, is_first: bool) -> ArrivalHistory:
    """Return the history in which `slot` is the present one; slots that were passed had nothing."""
    if is_first or slot <= history.slot:
        return replace(history, slot=slot) if is_first else history
    season = list(history.season)
    season[history.slot % SEASON_SLOTS] = history.slot_jobs
    for passed in range(history.slot + 1, min(slot, history.slot + SEASON_SLOTS + 1)):
        season[passed % SEASON_SLOTS] = 0.0
    return replace(history, slot=slot, slot_jobs=0.0, season=tuple(season))


def _with_gap(gaps: tuple[float, ...], gap_s: float) -> tuple[float, ...]:
    index = min(bisect.bisect_left(GAP_EDGES_S, gap_s), len(gaps) - 1)
    return tuple(GAP_MEMORY * n + (place == index) for place, n in enumerate(gaps))


def _by_gaps(history: ArrivalHistory, horizon_s: float, now_unix_s: float) -> float:
    age_s = max(0.0, now_unix_s - history.last_unix_s)
    longer = _longer_than(history.gaps, age_s)
    ended = longer - _longer_than(history.gaps, age_s + horizon_s)
    prior = _at_least_one(_expected_by_rate(history, horizon_s, now_unix_s))
    return min(1.0, (ended + prior) / (longer + 1.0))


def _longer_than(gaps: tuple[float, ...], age_s: float) -> float:
    """Return the weight of silences longer than `age_s`; within a bin they lie evenly."""
    index = bisect.bisect_left(GAP_EDGES_S, age_s)
    if index >= len(gaps):
        return 0.0
    below_s = GAP_EDGES_S[index - 1] if index else 0.0
    share = (GAP_EDGES_S[index] - age_s) / (GAP_EDGES_S[index] - below_s)
    return float(share * gaps[index] + sum(gaps[index + 1 :]))
