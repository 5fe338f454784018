"""What `bench.scheduler real` and `calibrate` replay, and on which cluster. Pure.

`paper` has the proportions of ServerlessLLM's setting as docs/simulation.md has it, on a smaller
cluster: two models for each place (32 on 16), memory for one copy of each, and, in loads from disk,
answers of 1.15 (GSM8K) and 3.24 (ShareGPT), half each. Its bursts (CV 8 on 16 places) bring as many
requests for each place as there: how many a burst has goes with the square of the CV. Its rate is
higher than there, so that the silences are short.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from bench.scheduler.real_cluster import Shape
from gearfall.core.ids import ModelName
from gearfall.simulation.arrivals import Lengths, Load, bursty_requests
from gearfall.simulation.requests import Request

PAPER_CV, PAPER_PLACES = 8.0, 16


@dataclass(frozen=True, slots=True)
class Answers:
    """How long some of the answers take on a machine that does nothing else, in loads from disk."""

    mean: float
    cv: float
    most: float = 8.0


@dataclass(frozen=True, slots=True)
class Trace:
    """How requests come, and the cluster that they come to."""

    shape: Shape
    per_s: float
    duration_s: float
    cv: float
    """Of the gaps."""
    zipf: float
    answers: tuple[Answers, ...]
    """Each for an equal part of the requests, drawn."""
    warm_up: float = 0.0
    """Part of the time that is not counted."""
    prompt: Lengths = field(default_factory=lambda: Lengths(24, 0.3, 64))


TRACES = {
    "paper": Trace(
        Shape(models=12, dram_models=4, is_filled=True),
        per_s=0.4,
        duration_s=100.0,
        cv=PAPER_CV * (6 / PAPER_PLACES) ** 0.5,
        zipf=0.0,
        answers=(
            Answers(1.15, 0.5),
            Answers(3.24, 0.9),
        ),
    ),
    "short": Trace(
        Shape(models=8, dram_models=4),
        per_s=1.0,
        duration_s=36.0,
        cv=2.0,
        zipf=0.5,
        answers=(Answers(0.2, 0.4),),
        warm_up=0.33,
    ),
}


def add_trace_flags(parser: argparse.ArgumentParser) -> None:
    """Add what chooses the trace; what is left out is the trace's own."""
    parser.add_argument("--rate", type=float, help="requests a second")
    parser.add_argument("--duration", type=float, help="seconds of the trace")
    parser.add_argument("--cv", type=float, help="of the gaps")
    parser.add_argument("--seed", type=int, default=1)


def trace_of(name: str, settings: argparse.Namespace) -> Trace:
    """Return the trace of that name as the flags change it."""
    trace = TRACES[name]
    return replace(
        trace,
        per_s=settings.rate or trace.per_s,
        duration_s=settings.duration or trace.duration_s,
        cv=settings.cv or trace.cv,
    )


def requests_of(
    trace: Trace, models: Sequence[ModelName], steps_per_load: float, seed: int
) -> tuple[Request, ...]:
    """Return a trace's requests; answers are counted in the tokens that a load's time is worth."""
    parts = [
        Lengths(each.mean * steps_per_load, each.cv, round(each.most * steps_per_load))
        for each in trace.answers
    ]
    load = Load(trace.per_s, trace.duration_s, trace.cv, trace.prompt, parts[0], zipf=trace.zipf)
    requests = bursty_requests(seed, models, load)
    generator = np.random.default_rng([seed, len(requests)])
    drawn = [part.draw(generator, len(requests)) for part in parts]
    of_part = generator.integers(len(parts), size=len(requests))
    return tuple(
        replace(each, stages=(replace(each.stages[0], output_tokens=drawn[part][number]),))
        for number, (each, part) in enumerate(zip(requests, of_part, strict=True))
    )
