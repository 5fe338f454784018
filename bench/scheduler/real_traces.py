"""What `bench.scheduler real` and `calibrate` replay, and on which cluster. Pure.

All traces have the proportions of ServerlessLLM's setting as docs/simulation.md gives it, and were
derived from them before anything was measured with them: two models for each place. In the first
two one half of the answers is as long as GSM8K's (120 tokens of 25.5 ms, 1.15 times the 2.66 s that
a load takes), one as ShareGPT's (338 tokens, 3.24 loads); arrivals are of CV 8 x sqrt(places / 16),
so that a burst, which grows with the square, brings as many requests for each place as there.

skewed  Popularity falls as 1 / rank: the paper gives its models the arrivals of Azure's functions,
        of which few are called often. Memory of a node holds 7 of 12 models (256 GB: 19 of 32), its
        own part first. Up to 16 answers at once on a replica. The rate is the paper's: 0.4/s for 16
        places are 0.15/s for 6, where a load takes 2.66 s; here a load takes 0.64 s, so that a
        start from disk is to one from memory as there (3.3 s to 0.63 s), and all else is as much
        faster: 0.62/s.
even    All models alike, memory for one copy of each, 4 answers at once, a load of 2.56 s and 0.4
        requests a second, three times the paper's load: what is waited for are places.
chat    What a platform for chats looks like: *skewed* with ShareGPT's answers only, in bursts as
        Azure's conversation trace has them, at three quarters of that rate (the paper's 0.3/s).
        In that trace the requests of ten seconds vary four times as much as by chance, as gaps of
        CV 2 have it in the long run. Memory of a node holds half of the models. Chosen on the map
        of `real_simulated` and fixed before it was run.
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
    """How long some of the answers take, in loads from disk."""

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
    prompt: Lengths = field(default_factory=lambda: Lengths(24, 0.3, 64))

    @property
    def running(self) -> float:
        """Answers at once on average, if each takes as long as it is said to."""
        mean_loads = sum(each.mean for each in self.answers) / len(self.answers)
        return self.per_s * mean_loads * self.shape.load_s


_GSM8K, _SHAREGPT = Answers(1.15, 0.5), Answers(3.24, 0.9)

TRACES = {
    "skewed": Trace(
        Shape(models=12, dram_models=7, slots=16, ssd_bytes_per_s=240_000_000),
        per_s=0.62,
        duration_s=80.0,
        cv=PAPER_CV * (6 / PAPER_PLACES) ** 0.5,
        zipf=1.0,
        answers=(_GSM8K, _SHAREGPT),
    ),
    "even": Trace(
        Shape(models=12, dram_models=4),
        per_s=0.4,
        duration_s=100.0,
        cv=PAPER_CV * (6 / PAPER_PLACES) ** 0.5,
        zipf=0.0,
        answers=(_GSM8K, _SHAREGPT),
    ),
    "chat": Trace(
        Shape(models=12, dram_models=6, slots=16, ssd_bytes_per_s=240_000_000),
        per_s=0.47,
        duration_s=80.0,
        cv=2.0,
        zipf=1.0,
        answers=(_SHAREGPT,),
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
