"""Measures how fast a model's replicas compute, through the cluster's public door.

Steps: so many streams at once; a step is the median gap between one stream's tokens while all of
them run. Prompts: how long they take to their first token. Overheads: a job of a single token, all
alone, and as many of them as a replica can take. A worker's part is what limits those.

    alone   = request_s + job_s + tell_s + its device time
    crowded = job_s + step of `slots` / slots            seconds a job

A job's device time comes with its answer: where a step takes long, one differs from another by more
than all the rest of a job. Who has to be woken while the worker computes, to take a job and to hand
its token over, waits for the core: such a job beside a stream comes at any moment of a step, and is
in the next.

    beside  = alone + step of 1 / 2 + step of 2 - step of 1 + 2 wake_s

Streams are told each token, answers that are taken whole are told their tokens together:

    whole   = alone + (tokens - 1) (step of 1 - tell_s)
"""

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from itertools import pairwise
from random import Random
from statistics import median
from typing import Any

from gearfall.client import AsyncClient, Finished, TextDelta
from gearfall.core.errors import InvalidRequest
from gearfall.core.profile import Speed
from gearfall.pb import common_pb2

_STREAM_PROMPT = 16
_CROWD_ROUNDS = 4
"""Times the slots: jobs of which the crowd consists."""
_BESIDE_TOKENS = 96
"""Of the stream beside which jobs of one token are asked for."""
_BESIDE_JOBS = 32
_BESIDE_STREAMS = 12
"""At most, one after the other: some are over before many jobs were beside them."""
MOST_TOLD = 0.9
"""Of a step, that telling its token may take: computing it takes some time."""
_GOLDEN = 0.618
"""Of a step, by which one job comes later in it than the one before: so all parts get as many."""


@dataclass(frozen=True, slots=True)
class SpeedSettings:
    """How a replica's speed is measured."""

    batches: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Streams at once; those above a replica's slots are left out."""
    step_tokens: int = 16
    """Of each stream."""
    prompts: tuple[int, ...] = (32, 64, 128)
    """Tokens; those beyond half the model's context are left out."""
    repeats: int = 4


@dataclass(frozen=True, slots=True)
class Served:
    """The replicas that are measured: all that are ready, of one kind of device."""

    facts: common_pb2.Model
    replicas: int
    slots: int
    """Of each."""


async def measure_speed(
    client: AsyncClient,
    served: Served,
    settings: SpeedSettings,
    progress: Callable[[], None] = lambda: None,
) -> Speed:
    """Return the speed of one replica; `progress` is called once a batch size."""
    steps: list[tuple[int, float]] = []
    for batch in (each for each in settings.batches if each <= served.slots):
        found = [await time_step(client, served, batch, settings) for _ in range(settings.repeats)]
        steps.append((batch, median(found)))
        progress()
    beside_device_s = await time_beside_device(client, served, settings.repeats)
    crowded_s = await _crowded(client, served)
    beside_s = await _beside(client, served, steps[0][1])
    whole_s = await _whole_step(client, served, settings)
    prompts = await _prompts(client, served, settings, beside_device_s)
    widest = steps[-1][0]
    measured = bounded_by_larger([*steps, *(each for each in prompts if each[0] > widest)])
    steps, larger = measured[: len(steps)], measured[len(steps) :]
    widest_s = steps[-1][1]
    base_s, per_job_s = line_through(steps)
    tell_s = telling(whole_s, (*steps, *larger))
    way_s = max(0.0, beside_device_s - tell_s)
    job_s = min(way_s, max(0.0, crowded_s - widest_s / widest))
    return Speed(
        slope_beyond(steps[-1], larger),
        base_s,
        per_job_s,
        (*steps, *larger),
        job_s,
        way_s - job_s,
        waking(beside_s, way_s, steps),
        tell_s,
    )


def bounded_by_larger(steps: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Return steps by rising tokens, none of which takes longer than one of more tokens.

    Where it seems to, it is what many streams are told in each step that takes long.
    """
    least_s, found = math.inf, []
    for tokens, seconds in reversed(steps):
        least_s = min(least_s, seconds)
        found.append((tokens, least_s))
    return found[::-1]


def waking(beside_s: float, way_s: float, steps: Sequence[tuple[int, float]]) -> float:
    """Return `wake_s`. beside_s: of a job of one token beside a stream; 0 where none was."""
    (_, alone_s), (_, pair_s) = (*steps, *steps)[:2] if len(steps) == 1 else steps[:2]
    return max(0.0, beside_s - way_s - alone_s / 2 - pair_s) / 2


def telling(whole_s: float, steps: Sequence[tuple[int, float]]) -> float:
    """Return `tell_s`: what a stream's step takes longer than one of a whole answer."""
    (_, alone_s), *_ = steps
    return min(max(0.0, alone_s - whole_s), *(MOST_TOLD * seconds for _, seconds in steps))


async def _prompts(
    client: AsyncClient, served: Served, settings: SpeedSettings, way_s: float
) -> list[tuple[int, float]]:
    """Return (tokens, seconds) of steps that are a prompt each; more tokens never take less."""
    found: list[tuple[int, float]] = []
    for length in settings.prompts:
        if length > served.facts.context_tokens // 2:
            break
        first_s = await time_first_token(client, served, length, settings.repeats)
        found.append((length, max(first_s - way_s, found[-1][1] if found else 1e-9)))
    return found


def slope_beyond(widest: tuple[int, float], larger: Sequence[tuple[int, float]]) -> float:
    """Return seconds a token beyond the largest measured step."""
    few, many = ([widest, *larger])[-2:] if larger else ((0, 0.0), widest)
    return max(0.0, many[1] - few[1]) / (many[0] - few[0])


def line_through(steps: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Return (seconds with one job, seconds for each further job) by least squares."""
    xs, ys = [batch - 1 for batch, _ in steps], [seconds for _, seconds in steps]
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    spread = sum((x - mean_x) ** 2 for x in xs)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True))
    slope = max(0.0, slope / spread) if spread else 0.0
    return max(mean_y - slope * mean_x, 1e-9), slope


async def time_step(
    client: AsyncClient, served: Served, batch: int, settings: SpeedSettings
) -> float:
    """Return the median seconds a token of a stream among `batch`, while all of them run."""
    longest = served.facts.context_tokens - _STREAM_PROMPT
    tokens, prompt = min(settings.step_tokens, longest), _prompt(served, _STREAM_PROMPT)
    streams = range(batch * served.replicas)
    seen = await asyncio.gather(*(_times(client, served, prompt, tokens) for _ in streams))
    begin_s, end_s = max(times[0][0] for times in seen), min(times[-1][0] for times in seen)
    gaps: list[float] = []
    for times in seen:
        for (before_s, _), (after_s, count) in pairwise(times):
            if begin_s <= before_s and after_s <= end_s:
                gaps += [(after_s - before_s) / count] * count
    if not gaps:
        # Streams of models this fast do not overlap: each had the replica to itself.
        gaps = [
            (times[-1][0] - times[0][0]) / max(1, sum(count for _, count in times[1:]))
            for times in seen
        ]
    return median(gaps)


async def _whole_step(client: AsyncClient, served: Served, settings: SpeedSettings) -> float:
    """Return the median seconds of a further token of an answer that is taken whole.

    Infinite where there is room for no further one.
    """
    tokens = min(settings.step_tokens, served.facts.context_tokens - _STREAM_PROMPT)
    if tokens < 2:
        return math.inf
    found = []
    for number in range(settings.repeats):
        short_s, long_s = [
            await _whole_answer(client, served, each, number) for each in (1, tokens)
        ]
        found.append((long_s - short_s) / (tokens - 1))
    return median(found)


async def _whole_answer(client: AsyncClient, served: Served, tokens: int, number: int) -> float:
    """Return the seconds of an answer of so many tokens."""
    prompt, began_s = _prompt(served, _STREAM_PROMPT, number), time.perf_counter()
    await client.generate(
        served.facts.name, prompt, max_tokens=tokens, temperature=0.0, ignore_eos=True
    )
    return time.perf_counter() - began_s


async def _crowded(client: AsyncClient, served: Served) -> float:
    """Return the seconds that a replica takes for each of many jobs of one token."""
    at_once = 2 * served.slots * served.replicas
    left = iter(range(_CROWD_ROUNDS * at_once))

    async def ask_until_done() -> None:
        for number in left:
            await _times(client, served, _prompt(served, 1, number), 1)

    began_s = time.perf_counter()
    await asyncio.gather(*(ask_until_done() for _ in range(at_once)))
    return (time.perf_counter() - began_s) * served.replicas / (_CROWD_ROUNDS * at_once)


async def _beside(client: AsyncClient, served: Served, step_s: float) -> float:
    """Return the median seconds of a job of one token that comes while its replica computes."""
    found: list[float] = []
    tokens = min(_BESIDE_TOKENS, served.facts.context_tokens - _STREAM_PROMPT)
    for _ in range(_BESIDE_STREAMS):
        prompt = _prompt(served, _STREAM_PROMPT)
        tasks = [
            asyncio.create_task(_times(client, served, prompt, tokens))
            for _ in range(served.replicas)
        ]
        streams = asyncio.gather(*tasks)
        try:
            await time_first_token(client, served, 1, 1)  # The streams run when it is back.
            while not streams.done() and len(found) < _BESIDE_JOBS:
                await asyncio.sleep(step_s * (_GOLDEN * len(found) % 1.0))
                seconds = await time_first_token(client, served, 1, 1)
                if not streams.done():
                    found.append(seconds)
            await streams
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(streams, *tasks, return_exceptions=True)
        if len(found) == _BESIDE_JOBS:
            break
    return median(found) if found else 0.0


async def time_first_token(client: AsyncClient, served: Served, length: int, repeats: int) -> float:
    """Return the median seconds to the first token of a prompt of so many tokens."""
    found = []
    for number in range(repeats):
        began_s = time.perf_counter()
        times = await _times(client, served, _prompt(served, length, number), 1)
        found.append(times[0][0] - began_s)
    return median(found)


async def time_beside_device(client: AsyncClient, served: Served, repeats: int) -> float:
    """Return the median seconds of a job of one token in which no device computed for it."""
    found = []
    for number in range(repeats):
        began_s = time.perf_counter()
        seen = await _seen(client, served, _prompt(served, 1, number), 1)
        found.append(seen.messages[0][0] - began_s - seen.device_s)
    return max(0.0, median(found))


async def _times(
    client: AsyncClient, served: Served, prompt: Sequence[int], tokens: int
) -> list[tuple[float, int]]:
    """Return when each message came and how many tokens it had."""
    return (await _seen(client, served, prompt, tokens)).messages


@dataclass(frozen=True, slots=True)
class _Seen:
    """An answer as it came."""

    messages: list[tuple[float, int]]
    """When each came and how many tokens it had."""
    device_s: float
    """Its share of the steps that it ran in."""


async def _seen(client: AsyncClient, served: Served, prompt: Sequence[int], tokens: int) -> _Seen:
    """Take an answer token by token."""
    found: list[tuple[float, int]] = []
    name, device_s = served.facts.name, 0.0
    events: Any = client.stream(
        name, prompt, max_tokens=tokens, temperature=0.0, ignore_eos=True, logprobs=True
    )
    async with aclosing(events) as opened:
        async for event in opened:
            if isinstance(event, TextDelta) and event.logprobs:
                found.append((time.perf_counter(), len(event.logprobs)))
            elif isinstance(event, Finished):
                device_s = event.usage.device_s
    if not found:
        raise InvalidRequest(f"{name} gave no token")
    return _Seen(found, device_s)


def _prompt(served: Served, length: int, seed: int = 0) -> list[int]:
    """Return random tokens: no prompt's prefix is one that was computed before."""
    draw = Random(f"{served.facts.name} {length} {seed} {time.monotonic_ns()}")  # noqa: S311
    return [draw.randrange(served.facts.vocabulary_size) for _ in range(max(1, length))]
