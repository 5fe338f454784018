"""Measures models on a running cluster through its public door: answers, then speed.

Answers: greedy, several at once, each with its tokens' log-probabilities. Speed: `speed`.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from gearfall.client import Answer, AsyncClient, Choice
from gearfall.core.certainty.agreement import answer_key
from gearfall.core.certainty.certainty import answer_probability
from gearfall.core.certainty.certainty_features import FLOOR
from gearfall.core.certainty.self_consistency import DEFAULT_TEMPERATURE
from gearfall.core.errors import InvalidRequest
from gearfall.core.profile import DrawnAnswer, Generation, ProfiledModel
from gearfall.pb import common_pb2
from gearfall.profiling.queries import LabelledQuery, agreement_rule
from gearfall.profiling.speed import Served, SpeedSettings, measure_speed
from gearfall.profiling.starts import measure_starts, start_of

Progress = Callable[[], None]
"""Called once a query and once a batch size."""


@dataclass(frozen=True, slots=True)
class MeasureSettings:
    """How a profile is measured."""

    max_tokens: int = 64
    """Of an answer."""
    at_once: int = 8
    """Queries that are asked at the same time."""
    samples: int = 0
    """Answers drawn beside each greedy one, for self-consistency: one fewer than a stage asks."""
    temperature: float = DEFAULT_TEMPERATURE
    """Of the drawn answers."""
    starts: int = 0
    """Times that the model is let go and started again; 0: only its first start is known."""
    speed: SpeedSettings = field(default_factory=SpeedSettings)


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
    replicas, device = await _replicas(client, name)
    replica = replicas[0]
    served = Served(facts, len(replicas), replica.slots)
    speed = await measure_speed(client, served, settings.speed, progress)
    starts = dict((start_of(replica),))
    if settings.starts:
        starts |= await measure_starts(client, name, settings.starts, progress)
    return ProfiledModel(
        name=name,
        digest=facts.digest,
        memory_bytes=replica.memory_bytes,
        slots=replica.slots,
        speeds={device: speed},
        start_s={tier: seconds for tier, seconds in starts.items() if seconds > 0},
        generations=generations,
    )


async def _facts(client: AsyncClient, name: str) -> common_pb2.Model:
    listed = {model.name: model for model in (await client.models()).models}
    if name not in listed:
        raise InvalidRequest(f"model {name} is not registered: `gearfall models` lists what is")
    return listed[name]


async def _replicas(client: AsyncClient, name: str) -> tuple[list[common_pb2.Replica], str]:
    """Return the ready replicas and the device kind of all of them."""
    found = [
        (replica, worker.device)
        for worker in (await client.status()).workers
        for replica in worker.replicas
        if replica.model == name and replica.state == common_pb2.REPLICA_STATE_READY
    ]
    devices = {device for _, device in found}
    if not found:
        raise InvalidRequest(
            f"no replica of {name} is ready any more: keep it while it is profiled"
        )
    if len(devices) > 1:
        raise InvalidRequest(
            f"{name} is ready on {', '.join(sorted(devices))}: profile it on one kind at a time"
        )
    return [replica for replica, _ in found], devices.pop()


async def _answers(
    client: AsyncClient,
    name: str,
    queries: Sequence[LabelledQuery],
    settings: MeasureSettings,
    progress: Progress,
) -> tuple[Generation, ...]:
    found: list[Generation | None] = [None] * len(queries)
    left = iter(enumerate(queries))
    asking = _Asking(client, name, settings, agreement_rule(queries))

    async def ask_until_done() -> None:
        for place, query in left:
            greedy = await asking.greedy(query)
            found[place] = await asking.with_samples(query, greedy, seed=place)
            progress()

    tasks = [asyncio.create_task(ask_until_done()) for _ in range(settings.at_once)]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return tuple(each for each in found if each is not None)


@dataclass(frozen=True, slots=True)
class _Asking:
    """One model that is asked."""

    client: AsyncClient
    model: str
    settings: MeasureSettings
    rule: str

    async def greedy(self, query: LabelledQuery) -> Generation:
        began_s = time.perf_counter()
        answer = await self.client.generate(
            self.model,
            query.prompt,
            max_tokens=self.settings.max_tokens,
            temperature=0.0,
            logprobs=True,
        )
        return _generation(answer, query, time.perf_counter() - began_s, self.rule)

    async def with_samples(
        self, query: LabelledQuery, greedy: Generation, *, seed: int
    ) -> Generation:
        """Return the answer with those that were drawn beside it."""
        if not self.settings.samples:
            return greedy
        drawn = await self.client.generate(
            self.model,
            query.prompt,
            max_tokens=self.settings.max_tokens,
            temperature=self.settings.temperature,
            n=self.settings.samples,
            seed=seed,
            logprobs=True,
        )
        return replace(
            greedy,
            drawn=tuple(_drawn(choice, query, self.rule) for choice in drawn.choices),
        )


def _drawn(choice: Choice, query: LabelledQuery, rule: str) -> DrawnAnswer:
    (stage,) = choice.stages
    return DrawnAnswer(
        answer_key=answer_key(choice.text, rule),
        quality=query.judge(choice.text),
        cost=choice.usage.cost_flops,
        output_tokens=choice.usage.completion_tokens,
        probability=answer_probability(stage.token_logprobs),
    )


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
        token_ids=tuple(each.token_id for each in choice.logprobs),
    )
