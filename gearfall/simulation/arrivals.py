"""Requests to replay: bursty synthetic ones and real traces, spread over many models. Seeded."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum

import numpy as np

from gearfall.core.ids import ModelName
from gearfall.simulation.requests import Request, StageWork


@dataclass(frozen=True, slots=True)
class Lengths:
    """A log-normal distribution of token counts, clipped."""

    mean: float
    cv: float
    """Standard deviation over mean."""
    most: int

    def draw(self, generator: np.random.Generator, count: int) -> list[int]:
        """Return so many lengths of at least 1."""
        sigma = float(np.sqrt(np.log1p(self.cv**2)))
        mu = float(np.log(self.mean)) - sigma**2 / 2
        drawn = generator.lognormal(mu, sigma, count)
        return [int(each) for each in np.clip(np.rint(drawn), 1, self.most)]


@dataclass(frozen=True, slots=True)
class TraceRow:
    """One request of a recorded trace."""

    at_s: float
    prompt_tokens: int
    output_tokens: int


def gamma_times(
    generator: np.random.Generator, *, per_s: float, cv: float, duration_s: float
) -> list[float]:
    """Return arrival times whose gaps are Gamma distributed with this mean rate and CV.

    A CV of 8 is ServerlessLLM's setting for bursts: many at once, then long silence.
    """
    shape = 1.0 / cv**2
    scale = 1.0 / (per_s * shape)
    times: list[float] = []
    # Time begins within a gap, and a long gap is more likely to be met than a short one.
    now_s = float(generator.gamma(shape + 1.0, scale)) * float(generator.random())
    while now_s < duration_s:
        times.append(now_s)
        now_s += float(generator.gamma(shape, scale))
    return times


def popularity(models: int, exponent: float) -> np.ndarray:
    """Return the share of each model: Zipf with this exponent; 0 makes all alike."""
    weights = 1.0 / np.arange(1, models + 1, dtype=np.float64) ** exponent
    return np.asarray(weights / weights.sum())


class Bursts(Enum):
    """What comes in bursts."""

    FLEET = "fleet"
    """All requests are one process, each for a model drawn by popularity: many models at once."""
    MODEL = "model"
    """Each model has a process of its own: many requests for one model at once."""


@dataclass(frozen=True, slots=True)
class Load:
    """How synthetic requests come."""

    per_s: float
    """Of the whole fleet, on average."""
    duration_s: float
    cv: float
    """Of the gaps between requests: 1 is Poisson, 8 is ServerlessLLM's bursts."""
    prompt: Lengths
    output: Lengths
    zipf: float = 0.0
    """Exponent of the models' popularity; 0: all alike."""
    bursts: Bursts = Bursts.FLEET


def bursty_requests(seed: int, models: Sequence[ModelName], load: Load) -> tuple[Request, ...]:
    """Return requests for `models`: as many as come in `load.duration_s` at `load.per_s`.

    Bursts are drawn until there are so many; then all times are stretched alike to that duration:
    what the bursts of one seed are like says nothing about how many requests there are.
    """
    generator = np.random.default_rng(seed)
    shares = popularity(len(models), load.zipf)
    wanted, span_s = max(1, round(load.per_s * load.duration_s)), load.duration_s
    arrivals: list[tuple[float, ModelName]] = []
    while len(arrivals) <= wanted:
        arrivals = sorted(_arrivals(generator, models, shares, replace(load, duration_s=span_s)))
        span_s *= 2.0
    stretch = load.duration_s / arrivals[wanted][0]
    prompts = load.prompt.draw(generator, wanted)
    outputs = load.output.draw(generator, wanted)
    return tuple(
        Request(number, at_s * stretch, (StageWork(model, prompts[number], outputs[number]),))
        for number, (at_s, model) in enumerate(arrivals[:wanted])
    )


def _arrivals(
    generator: np.random.Generator, models: Sequence[ModelName], shares: np.ndarray, load: Load
) -> list[tuple[float, ModelName]]:
    def times(per_s: float) -> list[float]:
        return gamma_times(generator, per_s=per_s, cv=load.cv, duration_s=load.duration_s)

    if load.bursts is Bursts.FLEET:
        whole = times(load.per_s)
        drawn = generator.choice(len(models), size=len(whole), p=shares)
        return [(at_s, models[int(index)]) for at_s, index in zip(whole, drawn, strict=True)]
    return [
        (at_s, model)
        for model, share in zip(models, shares, strict=True)
        for at_s in times(load.per_s * float(share))
    ]


def spread_trace(
    seed: int,
    rows: Sequence[TraceRow],
    models: Sequence[ModelName],
    *,
    zipf: float = 1.0,
    burst: int = 8,
    most_output: int | None = None,
) -> tuple[Request, ...]:
    """Return a trace's requests, each for one of `models`.

    A trace has one model: its rows are given away in runs of `burst` on average, each to one model
    drawn by popularity, so that what comes for a model comes in bursts as users' sessions do.
    """
    generator = np.random.default_rng(seed)
    shares = popularity(len(models), zipf)
    requests: list[Request] = []
    model = models[0]
    for number, row in enumerate(rows):
        if number == 0 or generator.random() < 1.0 / burst:
            model = models[int(generator.choice(len(models), p=shares))]
        output = row.output_tokens if most_output is None else min(row.output_tokens, most_output)
        work = StageWork(model, max(1, row.prompt_tokens), max(1, output))
        requests.append(Request(number, row.at_s, (work,)))
    return tuple(requests)
