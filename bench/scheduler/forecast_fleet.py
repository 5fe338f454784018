"""Arrivals of a fleet of models out of traces that have one model each. Seeded.

Of a trace its arrival times are kept, and so are its bursts: runs of rows go to one model, as in
users' sessions. Which model a run goes to is drawn by popularity (Zipf). The trace is played
several times over as so many days, each with draws of its own, so that what repeats is when a model
is popular and never its single arrivals:

- *daily*: a model's popularity rises and falls once a day around an hour of its own;
- *flat*: it does not;
- *timers*: half of the models are called by a clock each, every so many minutes with some jitter
  and only a few requests at once; the other half are as in *flat*.
"""

import csv
import gzip
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np

from gearfall.core.ids import ModelName

TRACES = Path(__file__).parents[3] / "shared" / "data" / "traces"
AZURE = ("AzureLLMInferenceTrace_conv_2023", "AzureLLMInferenceTrace_code_2023")
MOONCAKE = "mooncake_conversation_trace"
KINDS = ("daily", "flat", "timers")
_RUN = 20
"""Rows that go to one model, on average."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request."""

    at_s: float
    model: ModelName


def read_times(name: str, directory: Path = TRACES) -> np.ndarray:
    """Return a trace's arrival times in seconds from its first."""
    with gzip.open(directory / f"{name}.csv.gz", "rt") as file:
        rows = csv.reader(file)
        next(rows)
        times = [_seconds(row[0], is_azure=name in AZURE) for row in rows]
    return np.sort(np.asarray(times)) - min(times)


def _seconds(text: str, *, is_azure: bool) -> float:
    if not is_azure:
        return float(text) / 1000.0
    # The trace writes seven digits of a second, datetime reads six.
    return datetime.fromisoformat(text[:26] + "+00:00").timestamp()


def make_arrivals(
    times_s: np.ndarray, models: list[ModelName], *, kind: str, days: int, seed: int
) -> tuple[list[Arrival], float]:
    """Return the arrivals of all days in order, and the length of a day in seconds."""
    generator = np.random.default_rng(seed)
    day_s = float(np.ceil(times_s[-1] / 60.0) * 60.0)
    shares = 1.0 / np.arange(1, len(models) + 1)
    hours = generator.random(len(models))
    timed = len(models) // 2 if kind == "timers" else 0
    shares[len(models) - timed :] = 0.0
    arrivals: list[Arrival] = []
    for day in range(days):
        turns = hours if kind == "daily" else None
        of_day = _of_day(generator, times_s, models, shares, turns)
        arrivals += [Arrival(day * day_s + each.at_s, each.model) for each in of_day]
    for model in models[len(models) - timed :]:
        arrivals += _timed(generator, model, days * day_s)
    return sorted(arrivals, key=lambda each: (each.at_s, each.model)), day_s


def _of_day(
    generator: np.random.Generator,
    times_s: np.ndarray,
    models: list[ModelName],
    shares: np.ndarray,
    hours: np.ndarray | None,
) -> list[Arrival]:
    ends = np.flatnonzero(generator.random(len(times_s)) < 1.0 / _RUN)
    begins = np.concatenate(([0], ends + 1))
    arrivals: list[Arrival] = []
    for begin, end in zip(begins, [*ends + 1, len(times_s)], strict=True):
        if begin >= end:
            continue
        weights = shares.copy()
        if hours is not None:
            turn = times_s[begin] / times_s[-1]
            weights *= (0.5 + 0.5 * np.cos(2 * np.pi * (turn - hours))) ** 4
        model = models[int(generator.choice(len(models), p=weights / weights.sum()))]
        arrivals += [Arrival(float(at_s), model) for at_s in times_s[begin:end]]
    return arrivals


def _timed(generator: np.random.Generator, model: ModelName, until_s: float) -> list[Arrival]:
    period_s = float(generator.uniform(180.0, 1500.0))
    at_s = float(generator.uniform(0.0, period_s))
    arrivals = []
    while at_s < until_s:
        arrivals += [Arrival(at_s + 0.5 * n, model) for n in range(int(generator.integers(1, 4)))]
        at_s += period_s * float(generator.normal(1.0, 0.05))
    return [each for each in arrivals if each.at_s < until_s]
