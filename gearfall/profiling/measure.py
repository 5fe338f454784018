"""Measures models on a running cluster through its public door: answers, then speed.

Answers: greedy, several at once, each with its tokens' log-probabilities. Speed: so many streams at
once; a step is the median gap between one stream's tokens while all of them run, a prompt's time is
the slope of the time to the first token over two prompt lengths.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from itertools import pairwise
from random import Random
from statistics import median
from typing import Any

from gearfall.client import Answer, AsyncClient, TextDelta
from gearfall.core.agreement import answer_key
from gearfall.core.certainty_features import FLOOR
from gearfall.core.errors import InvalidRequest
from gearfall.core.profile import Generation, ProfiledModel, Speed
from gearfall.core.records import Tier
from gearfall.infra.convert import TIER_FROM_PB
from gearfall.pb import common_pb2
from gearfall.profiling.queries import LabelledQuery, agreement_rule

Progress = Callable[[], None]
"""Called once a query and once a batch size."""


@dataclass(frozen=True, slots=True)
class MeasureSettings:
    """How a profile is measured."""

    max_tokens: int = 64
    """Of an answer."""
    at_once: int = 8
    """Queries that are asked at the same time."""
    batches: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Streams at once, for the speed; those above a replica's slots are left out."""
    step_tokens: int = 24
    """Of each stream."""
    prompts: tuple[int, int] = (16, 96)
    """Tokens of a short and a long prompt."""
    repeats: int = 3


async def profile_model(
    client: AsyncClient,
    name: str,
    queries: Sequence[LabelledQuery],
    settings: MeasureSettings,
    progress: Progress = lambda: None,
) -> ProfiledModel:
    """Return one model's profile. The first question starts the model where it is cold.

    Raises NotFound for a model that is not registered, and what the cluster raises.
    """
    facts = await _facts(client, name)
    generations = await _answers(client, name, queries, settings, progress)
    replica, device = await _replica(client, name)
    tier = TIER_FROM_PB.get(replica.timeline.from_tier, Tier.SSD)
    # The first start after a registration waits for the canary; no later one does.
    start_s = replica.timeline.total_s - replica.timeline.prepare_s
    return ProfiledModel(
        name=name,
        digest=facts.digest,
        memory_bytes=replica.memory_bytes,
        slots=replica.slots,
        speeds={device: await _speed(client, facts, replica.slots, settings, progress)},
        start_s={tier.value: start_s} if start_s > 0 else {},
        generations=generations,
    )


async def _facts(client: AsyncClient, name: str) -> common_pb2.Model:
    listed = {model.name: model for model in (await client.models()).models}
    if name not in listed:
        raise InvalidRequest(f"model {name} is not registered: `gearfall models` lists what is")
    return listed[name]


async def _replica(client: AsyncClient, name: str) -> tuple[common_pb2.Replica, str]:
    for worker in (await client.status()).workers:
        for replica in worker.replicas:
            if replica.model == name and replica.state == common_pb2.REPLICA_STATE_READY:
                return replica, worker.device
    raise InvalidRequest(f"no replica of {name} is ready any more: keep it while it is profiled")


async def _answers(
    client: AsyncClient,
    name: str,
    queries: Sequence[LabelledQuery],
    settings: MeasureSettings,
    progress: Progress,
) -> tuple[Generation, ...]:
    found: list[Generation | None] = [None] * len(queries)
    left = iter(enumerate(queries))
    rule = agreement_rule(queries)

    async def ask_until_done() -> None:
        for place, query in left:
            began_s = time.perf_counter()
            answer = await client.generate(
                name,
                query.prompt,
                max_tokens=settings.max_tokens,
                temperature=0.0,
                logprobs=True,
            )
            found[place] = _generation(answer, query, time.perf_counter() - began_s, rule)
            progress()

    tasks = [asyncio.create_task(ask_until_done()) for _ in range(settings.at_once)]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return tuple(each for each in found if each is not None)


def _generation(answer: Answer, query: LabelledQuery, latency_s: float, rule: str) -> Generation:
    (choice,) = answer.choices
    (stage,) = choice.stages
    return Generation(
        quality=query.judge(choice.text),
        cost=max(choice.usage.cost_flops, 1.0),
        prompt_tokens=choice.usage.prompt_tokens,
        output_tokens=choice.usage.completion_tokens,
        logprobs=tuple(max(FLOOR, each) for each in stage.token_logprobs),
        margins=tuple(min(-FLOOR, each) for each in stage.token_margins),
        latency_s=latency_s,
        answer_key=answer_key(choice.text, rule),
    )


async def _speed(
    client: AsyncClient,
    facts: common_pb2.Model,
    slots: int,
    settings: MeasureSettings,
    progress: Progress,
) -> Speed:
    short, long = (min(n, facts.context_tokens // 2) for n in settings.prompts)
    step_tokens = min(settings.step_tokens, facts.context_tokens - long)
    steps = []
    for batch in (each for each in settings.batches if each <= slots):
        prompt = _prompt(facts, short)
        seen = [
            await _steps(client, facts.name, prompt, batch, step_tokens)
            for _ in range(settings.repeats)
        ]
        steps.append((batch, median(seen)))
        progress()
    first_s = [
        median(
            [
                await _first_token(client, facts.name, _prompt(facts, length, number))
                for number in range(settings.repeats)
            ]
        )
        for length in (short, long)
    ]
    slope = max(0.0, first_s[1] - first_s[0]) / max(1, long - short)
    base_s, per_job_s = _line(steps)
    return Speed(slope, base_s, per_job_s, tuple(steps))


def _line(steps: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Return (seconds with one job, seconds for each further job) by least squares."""
    xs, ys = [batch - 1 for batch, _ in steps], [seconds for _, seconds in steps]
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    spread = sum((x - mean_x) ** 2 for x in xs)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True))
    slope = max(0.0, slope / spread) if spread else 0.0
    return max(mean_y - slope * mean_x, 1e-9), slope


async def _steps(
    client: AsyncClient, name: str, prompt: Sequence[int], batch: int, tokens: int
) -> float:
    """Return the median seconds a token of a stream among `batch`, while all of them run."""
    seen = await asyncio.gather(*(_times(client, name, prompt, tokens) for _ in range(batch)))
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


async def _first_token(client: AsyncClient, name: str, prompt: Sequence[int]) -> float:
    began_s = time.perf_counter()
    times = await _times(client, name, prompt, 1)
    return times[0][0] - began_s


async def _times(
    client: AsyncClient, name: str, prompt: Sequence[int], tokens: int
) -> list[tuple[float, int]]:
    """Return when each message came and how many tokens it had."""
    found = []
    events: Any = client.stream(
        name, prompt, max_tokens=tokens, temperature=0.0, ignore_eos=True, logprobs=True
    )
    async with aclosing(events) as opened:
        async for event in opened:
            if isinstance(event, TextDelta) and event.logprobs:
                found.append((time.perf_counter(), len(event.logprobs)))  # noqa: PERF401
    if not found:
        raise InvalidRequest(f"{name} gave no token")
    return found


def _prompt(facts: common_pb2.Model, length: int, seed: int = 0) -> list[int]:
    """Return random tokens: no prompt's prefix is one that was computed before."""
    draw = Random(f"{facts.name} {length} {seed} {time.monotonic_ns()}")  # noqa: S311
    return [draw.randrange(facts.vocabulary_size) for _ in range(max(1, length))]
