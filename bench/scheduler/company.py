"""Answers that run while something else is measured on a real cluster.

All replicas of that cluster share one machine: a step beside two other answers takes about twice as
long as alone. What is measured alone says little of a trace under which others run.
"""

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Sequence
from statistics import median

from bench.scheduler.real_cluster import RealSite
from bench.scheduler.real_traces import Trace
from gearfall.core.errors import InvalidRequest
from gearfall.core.ids import ModelName

_LONG_ANSWER = 8000
_PROBES, _PROMPT_TOKENS, _TOKENS = 5, 24, 65


def company_of(trace: Trace) -> int:
    """Return how many answers of a trace run on average. Raises InvalidRequest if they leave no
    place to measure at."""
    company, places = math.ceil(trace.running), trace.shape.nodes * trace.shape.places
    if company >= places:
        raise InvalidRequest(
            f"{company} answers run at once and the cluster has {places} places: none is left to "
            "measure at; ask for a lower rate",
            param="rate",
        )
    return company


@contextlib.asynccontextmanager
async def answering(site: RealSite, models: Sequence[ModelName]) -> AsyncIterator[None]:
    """Have each of these models answer without end; an answer that fails ends what runs beside it,
    in an ExceptionGroup."""

    async def answer(model: ModelName, has_begun: asyncio.Event) -> None:
        while True:
            events = site.client.stream(
                model, [5], max_tokens=_LONG_ANSWER, temperature=0.0, ignore_eos=True
            )
            async with contextlib.aclosing(events) as opened:  # type: ignore[type-var]
                async for _ in opened:
                    has_begun.set()

    begun = [asyncio.Event() for _ in models]
    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(answer(model, event))
            for model, event in zip(models, begun, strict=True)
        ]
        for event in begun:
            await event.wait()
        yield
        for task in tasks:
            task.cancel()


async def step_in_company(site: RealSite, company: int) -> float:
    """Return the seconds of a step of one answer while so many others run on replicas of their
    own."""
    busy, probed = site.models[:company], site.models[company]
    async with site.scheduled_by("ours"):
        async with answering(site, busy):
            steps_s = [
                (await site.probe(probed, _PROMPT_TOKENS, _TOKENS))[1] for _ in range(_PROBES)
            ]
        await site.empty()
    return median(steps_s)
