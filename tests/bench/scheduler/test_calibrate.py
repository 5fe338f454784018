"""What runs beside the measurements: an owner for each, and a place left for what is measured."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from types import SimpleNamespace
from typing import Any, cast

import pytest

from bench.scheduler.calibrate import exits_of
from bench.scheduler.company import answering, company_of
from bench.scheduler.real_cluster import RealSite, Shape
from bench.scheduler.real_traces import Answers, Trace
from gearfall.core.errors import InvalidRequest, Unavailable
from gearfall.core.ids import ModelName

MODELS = [ModelName("good"), ModelName("bad")]
SHAPE = Shape(nodes=3, places=2)


class Streams:
    """The client: an answer is one event, and then waits for `fails`, which is for the bad one."""

    def __init__(self) -> None:
        self.open: list[str] = []
        self.fails = asyncio.Event()
        self.says_something = True

    async def stream(self, model: str, _prompt: list[int], **_options: Any) -> AsyncIterator[str]:
        """Of `model`."""
        self.open.append(model)
        try:
            if self.says_something or model == "good":
                yield "a token"
            if model == "bad":
                await self.fails.wait()
                raise Unavailable("no answer")
            await asyncio.Event().wait()
        finally:
            self.open.remove(model)


def site_of(**parts: object) -> RealSite:
    return cast("RealSite", SimpleNamespace(**parts))


async def test_answers_end_with_what_is_measured_beside_them():
    client = Streams()
    async with answering(site_of(client=client), MODELS):
        assert sorted(client.open) == ["bad", "good"]
    assert client.open == []


async def measured_without_end(
    *, beside: AbstractAsyncContextManager[object], then: Streams | None = None
) -> None:
    async with asyncio.timeout(5), beside:
        if then is not None:
            then.fails.set()
        await asyncio.Event().wait()


@pytest.mark.parametrize("says_something", [True, False])
async def test_an_answer_that_fails_ends_what_is_measured_beside_it(says_something):
    client = Streams()
    client.says_something = says_something
    if not says_something:
        client.fails.set()
    with pytest.raises(ExceptionGroup) as caught:
        await measured_without_end(beside=answering(site_of(client=client), MODELS), then=client)
    assert caught.value.subgroup(Unavailable) is not None
    assert client.open == []


class BrokenView:
    """A cluster that can't be followed any more."""

    view = SimpleNamespace(replicas={}, assignments={})

    async def changes(self) -> AsyncIterator[frozenset[str]]:
        """The first, and no more."""
        yield frozenset()
        raise Unavailable("no view")


async def test_a_cluster_that_can_not_be_followed_ends_what_is_measured():
    with pytest.raises(ExceptionGroup) as caught:
        await measured_without_end(beside=exits_of(site_of(cluster=BrokenView())))
    assert caught.value.subgroup(Unavailable) is not None


@pytest.mark.parametrize(("running", "company"), [(0.0, 0), (0.1, 1), (1.0, 1), (1.1, 2), (5.0, 5)])
def test_company_is_what_runs_on_average(running, company):
    assert company_of(trace_of(running)) == company


def test_company_that_leaves_no_place_is_refused():
    with pytest.raises(InvalidRequest, match="6 answers run at once and the cluster has 6 places"):
        company_of(trace_of(5.5))


def trace_of(running: float) -> Trace:
    answers = (Answers(0.5, 1.0), Answers(1.5, 1.0))
    return Trace(SHAPE, running / SHAPE.load_s, 10.0, cv=1.0, zipf=0.0, answers=answers)
