"""What is made of measured times."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any, cast

import pytest

from gearfall.client import AsyncClient, Finished, TextDelta
from gearfall.client.values import TokenLogprob
from gearfall.core.errors import Unavailable
from gearfall.core.generation.job import FinishReason
from gearfall.core.generation.usage import Usage
from gearfall.pb import common_pb2
from gearfall.profiling.speed import (
    Served,
    SpeedSettings,
    bounded_by_larger,
    line_through,
    measure_speed,
    slope_beyond,
    telling,
    time_beside_device,
    waking,
)

REPLICAS, STEP_TOKENS = 2, 2
TOKEN = TextDelta(0, "a", (TokenLogprob(1, "a", -0.1),))


class FailingBeside:
    """Answers at once, until streams longer than those of a step run on all replicas. Of what comes
    then the `fails` fail; the streams have no end."""

    def __init__(self, fails: str) -> None:
        self.fails = fails
        self.open = 0
        self.all_open = asyncio.Event()

    async def stream(
        self, _model: str, _prompt: Sequence[int], *, max_tokens: int, **_options: Any
    ) -> AsyncIterator[TextDelta]:
        """One message a token."""
        if max_tokens <= STEP_TOKENS:
            if self.open:
                await self.all_open.wait()
                if self.fails == "job":
                    raise Unavailable("no job")
            for _ in range(max_tokens):
                await asyncio.sleep(0)
                yield TOKEN
            return
        self.open += 1
        try:
            yield TOKEN
            if self.open == REPLICAS:
                self.all_open.set()
                if self.fails == "stream":
                    raise Unavailable("no stream")
            await asyncio.Event().wait()
        finally:
            self.open -= 1


@pytest.mark.parametrize("fails", ["job", "stream"])
async def test_no_stream_runs_on_when_something_fails_beside_it(fails):
    client = FailingBeside(fails)
    served = Served(
        common_pb2.Model(name="m", context_tokens=512, vocabulary_size=9), REPLICAS, slots=2
    )
    settings = SpeedSettings(batches=(1,), step_tokens=STEP_TOKENS, prompts=(), repeats=1)
    with pytest.raises(Unavailable, match=f"no {fails}"):
        await measure_speed(cast("AsyncClient", client), served, settings)
    assert client.all_open.is_set()
    assert client.open == 0


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([(1, 0.5)], (0.5, 0.0)),
        ([(1, 0.5), (3, 0.7)], (0.5, 0.1)),
        ([(1, 1.0), (2, 1.0), (3, 4.0)], (0.5, 1.5)),
        ([(1, 0.9), (5, 0.5)], (0.7, 0.0)),  # batches never make a step shorter
    ],
)
def test_a_line_through_steps(steps, expected):
    assert line_through(steps) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([(1, 0.1)], [(1, 0.1)]),
        ([(1, 0.1), (4, 0.2), (8, 0.2)], [(1, 0.1), (4, 0.2), (8, 0.2)]),
        ([(1, 0.1), (4, 0.5), (16, 0.9), (32, 0.3)], [(1, 0.1), (4, 0.3), (16, 0.3), (32, 0.3)]),
    ],
)
def test_more_tokens_never_take_less(steps, expected):
    assert bounded_by_larger(steps) == expected


@pytest.mark.parametrize(
    ("larger", "expected"),
    [
        ([], 0.4 / 16),
        ([(48, 1.04)], 0.02),
        ([(32, 0.5), (64, 2.1)], 0.05),
        ([(32, 0.3)], 0.0),
    ],
)
def test_the_slope_beyond_the_largest_steps(larger, expected):
    assert slope_beyond((16, 0.4), larger) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("beside_s", "steps", "expected"),
    [
        (0.0, [(1, 0.4), (2, 0.5)], 0.0),  # no stream ran beside it
        (0.1 + 0.2 + 0.5 + 2 * 0.03, [(1, 0.4), (2, 0.5), (4, 0.9)], 0.03),
        (0.1 + 0.2 + 0.4 + 2 * 0.03, [(1, 0.4)], 0.03),
        (0.5, [(1, 0.4), (2, 0.5)], 0.0),
    ],
)
def test_what_a_job_waits_beside_a_stream_and_not_for_its_steps(beside_s, steps, expected):
    assert waking(beside_s, 0.1, steps) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("whole_s", "steps", "expected"),
    [
        (0.3, [(1, 0.4), (4, 0.9)], 0.1),
        (0.5, [(1, 0.4), (4, 0.9)], 0.0),
        (0.0, [(1, 0.4), (4, 0.9)], 0.36),  # one token is all that the model may give
        (-0.2, [(1, 0.4), (4, 0.2)], 0.18),  # a step that was measured to be shorter stays one
    ],
)
def test_what_a_stream_s_step_takes_longer_is_telling(whole_s, steps, expected):
    assert telling(whole_s, steps) == pytest.approx(expected)


class PacedDevice:
    """Answers at once, and says that the device had so many seconds of each job."""

    def __init__(self, *device_s: float) -> None:
        self._device_s = iter(device_s)

    async def stream(
        self, _model: str, _prompt: Sequence[int], **_options: Any
    ) -> AsyncIterator[TextDelta | Finished]:
        yield TOKEN
        usage = Usage(1, 1, 1, 1, 1.0, device_s=next(self._device_s))
        yield Finished(0, FinishReason.LENGTH, "m", (), usage)


async def test_of_each_job_its_own_time_on_the_device_is_taken_off():
    """Less than none at all, as nothing is waited for here: what is left is far above the rest."""
    client = PacedDevice(-10.0, -30.0, -500.0)
    served = Served(common_pb2.Model(name="m", context_tokens=8, vocabulary_size=9), 1, slots=2)
    found_s = await time_beside_device(cast("AsyncClient", client), served, 3)
    assert found_s == pytest.approx(30.0, abs=9.0)
