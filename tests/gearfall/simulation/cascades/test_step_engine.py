"""Steps that share tokens and cores: by hand, and against one step after the other."""

from collections import deque
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gearfall.core.ids import ModelName
from gearfall.simulation.agenda import EPOCH_S, Agenda
from gearfall.simulation.cascades.step_engine import STEP_TOKENS, Cores, StepEngine, StepSpeed
from gearfall.simulation.requests import Job, Request, StageWork

SPEED = StepSpeed(((1, 0.1), (4, 0.13), (16, 0.37)), 0.02, job_s=0.05)
PLAIN = StepSpeed(((1, 0.1), (64, 0.1)), 0.1)


def job(number: int, prompt: int = 10, output: int = 11, **more: Any) -> Job:
    work = StageWork(ModelName("m"), prompt, output, **more)
    return Job(Request(number, 0.0, (work,)), 0, EPOCH_S, EPOCH_S)


class Bench:
    """Engines on one agenda, and who ended when."""

    def __init__(self, *speeds: StepSpeed, cores: Cores | None = None, answers: str = "") -> None:
        """`answers`: y or n for each time that it is asked whether a job may be stopped."""
        self.agenda = Agenda()
        self.ends: dict[int, float] = {}
        self._answers = iter(answers)
        self.engines = [
            StepEngine(each, self.agenda, self._ended, cores, self._may_stop) for each in speeds
        ]

    def _may_stop(self, _: Job) -> bool:
        return next(self._answers) == "y"

    def _ended(self, done: Job) -> None:
        assert done.request.number not in self.ends
        self.ends[done.request.number] = self.agenda.now_s - EPOCH_S

    def begin(self, at_s: float, coming: Job, engine: int = 0) -> None:
        def begin_it() -> None:
            way_s = self.engines[engine].begin(coming)
            assert way_s >= self.engines[engine].speed.request_s

        self.agenda.at(EPOCH_S + at_s, begin_it)

    def run(self) -> None:
        while self.agenda.step():
            pass


@pytest.mark.parametrize(
    ("tokens", "seconds"), [(1, 0.1), (2, 0.11), (4, 0.13), (10, 0.25), (16, 0.37), (20, 0.45)]
)
def test_a_step_lies_on_the_measured_lines(tokens, seconds):
    assert SPEED.step_s(tokens) == pytest.approx(seconds)


def test_one_job_takes_its_own_cost_its_prompt_and_a_step_for_each_further_token():
    bench, one = Bench(SPEED), job(1)
    bench.begin(0.0, one)
    bench.run()
    assert one.first_token_s - EPOCH_S == pytest.approx(0.05 + 0.25)
    assert bench.ends == {1: pytest.approx(0.05 + 0.25 + 10 * 0.1)}
    assert bench.engines[0].used_s == pytest.approx(bench.ends[1])
    assert one.done_tokens == 11


def test_who_comes_waits_for_the_running_step_and_computes_its_prompt_beside_the_others():
    bench = Bench(SPEED)
    bench.begin(0.0, job(1))
    bench.begin(0.33, job(2, prompt=3, output=2))
    bench.run()
    # The step that ends at 0.40 runs on; then 1 + 3 tokens, 2, and the other alone again.
    assert bench.ends[2] == pytest.approx(0.40 + 0.05 + 0.13 + 0.11)
    assert bench.ends[1] == pytest.approx(0.40 + 0.05 + 0.13 + 0.11 + 7 * 0.1)


def test_the_way_of_a_job_delays_it_and_costs_no_core():
    bench = Bench(StepSpeed(((1, 0.1),), 0.0, request_s=0.5))
    bench.begin(0.0, job(1, prompt=1, output=3))
    bench.run()
    assert bench.ends == {1: pytest.approx(0.8)}
    assert bench.engines[0].used_s == pytest.approx(0.3)


def test_who_is_woken_beside_others_waits_for_the_core_on_both_ways():
    woken = StepSpeed(((1, 0.1),), 0.0, wake_s=0.03)
    bench = Bench(woken, woken, cores=Cores(2))
    bench.begin(0.0, job(1, prompt=1, output=5))
    bench.begin(0.1, job(2, prompt=1, output=1), engine=1)
    bench.run()
    # Nobody computes when the first comes, nor when its end is told.
    assert bench.ends == {2: pytest.approx(0.1 + 0.03 + 0.1 + 0.03), 1: pytest.approx(0.5)}


def test_a_long_prompt_is_computed_in_pieces_while_others_decode():
    bench, long = Bench(PLAIN), job(2, prompt=STEP_TOKENS, output=1)
    bench.begin(0.0, job(1, prompt=1, output=4))
    bench.begin(0.01, long)
    bench.run()
    # Beside one that decodes there is room for all but one of its tokens.
    assert long.first_token_s - EPOCH_S == pytest.approx(0.1 + PLAIN.step_s(STEP_TOKENS) + 0.1)


def test_replicas_of_one_worker_share_its_core():
    bench = Bench(PLAIN, PLAIN, cores=Cores())
    bench.begin(0.0, job(1, prompt=1, output=4))
    bench.begin(0.1, job(2, prompt=1, output=1), engine=1)
    bench.run()
    # From 0.1 on both have half a core; the second needs 0.1 of it, then the first is alone.
    assert bench.ends == {2: pytest.approx(0.3), 1: pytest.approx(0.5)}


def test_a_worker_that_becomes_slower_gets_less_done_from_then_on():
    cores = Cores()
    bench = Bench(PLAIN, PLAIN, cores=cores)
    bench.begin(0.0, job(1, prompt=1, output=4))
    bench.begin(0.1, job(2, prompt=1, output=1), engine=1)
    bench.agenda.at(EPOCH_S + 0.2, lambda: cores.slow_down(2.0))
    bench.agenda.at(EPOCH_S + 0.5, lambda: cores.slow_down(0.5))
    bench.run()
    # At 0.2 half of a step of either is left: 0.2 of a core at half speed. At 0.4 the second is
    # done; the first has 0.2 of 0.4 done by then, 0.25 by 0.5, and the rest at twice the speed.
    assert bench.ends == {2: pytest.approx(0.4), 1: pytest.approx(0.575)}
    assert [each.used_s for each in bench.engines] == [pytest.approx(0.425), pytest.approx(0.15)]


def test_two_cores_are_enough_for_two_replicas():
    bench = Bench(PLAIN, PLAIN, cores=Cores(2))
    bench.begin(0.0, job(1, prompt=1, output=4))
    bench.begin(0.1, job(2, prompt=1, output=1), engine=1)
    bench.run()
    assert bench.ends == {2: pytest.approx(0.2), 1: pytest.approx(0.4)}


@pytest.mark.parametrize(
    ("stop_tokens", "gather_s", "answers", "done", "end_s"),
    [
        (3, 0.0, "y", 3, 0.3),  # It is told with each step.
        (3, 0.35, "y", 4, 0.4),  # Held since 0.1: the step behind the fourth would end too late.
        (2, 0.35, "y", 4, 0.4),
        (5, 0.35, "y", 8, 0.8),
        (9, 9.0, "", 11, 1.1),  # Its end is told before.
        (3, 0.0, "ny", 6, 0.6),  # Asked again at twice as many.
        (6, 0.0, "n", 11, 1.1),
    ],
)
def test_a_job_may_be_stopped_when_it_is_told_that_it_may_be(
    stop_tokens, gather_s, answers, done, end_s
):
    bench = Bench(PLAIN, answers=answers)
    one = job(1, prompt=1, stop_tokens=stop_tokens, gather_s=gather_s)
    bench.begin(0.0, one)
    bench.run()
    assert bench.ends == {1: pytest.approx(end_s)}
    assert one.done_tokens == done
    assert bench.engines[0].used_s == pytest.approx(end_s)
    assert list(bench._answers) == [], "it was asked that often"


@pytest.mark.parametrize(("gather_s", "end_s"), [(0.0, 4 * 0.1), (0.35, 4 * 0.06 + 0.04)])
def test_steps_whose_tokens_wait_are_shorter_by_telling_them_and_tell_them_once(gather_s, end_s):
    bench = Bench(StepSpeed(((1, 0.1),), 0.0, tell_s=0.04))
    bench.begin(0.0, job(1, prompt=1, output=4, gather_s=gather_s))
    bench.run()
    assert bench.ends == {1: pytest.approx(end_s)}


@pytest.mark.parametrize(("output", "gather_s"), [(3, 9.0), (9, 0.0)])
def test_anothers_end_tells_what_was_held_and_so_does_who_is_read_along(output, gather_s):
    bench = Bench(PLAIN, answers="y")
    bench.begin(0.0, job(1, prompt=1, stop_tokens=4, gather_s=9.0))
    bench.begin(0.0, job(2, prompt=1, output=output, gather_s=gather_s))
    bench.run()
    assert bench.ends[1] == pytest.approx(0.4)


COMING = st.lists(
    st.tuples(st.floats(0.0, 5.0), st.integers(1, 300), st.integers(1, 12)), max_size=12
)


@settings(max_examples=60, deadline=None)
@given(COMING)
def test_blocks_of_steps_are_the_same_as_one_step_after_the_other(coming):
    coming = [(at_s + number * 1e-3, p, o) for number, (at_s, p, o) in enumerate(sorted(coming))]
    bench = Bench(SPEED)
    for number, (at_s, prompt, output) in enumerate(coming):
        bench.begin(at_s, job(number, prompt, output))
    bench.run()
    assert bench.ends == pytest.approx(step_by_step(coming))


@settings(max_examples=60, deadline=None)
@given(COMING, st.integers(2, 3))
def test_a_shared_core_is_never_idle_and_never_doubled(coming, replicas):
    """Whoever shares: the core has done all work after as long as it took from the first job on."""
    bench = Bench(*[SPEED] * replicas, cores=Cores())
    for number, (at_s, prompt, output) in enumerate(coming):
        bench.begin(at_s, job(number, prompt, output), engine=number % replicas)
    bench.run()
    assert len(bench.ends) == len(coming)
    used_s = sum(each.used_s for each in bench.engines)
    if coming:
        begin_s, end_s = min(at_s for at_s, _, _ in coming), max(bench.ends.values())
        assert used_s <= end_s - begin_s + 1e-6
        gaps_s = sum(
            after - before for before, after in pairwise(sorted(at for at, _, _ in coming))
        )
        assert used_s >= end_s - begin_s - gaps_s - 1e-6


def step_by_step(coming: list[tuple[float, int, int]]) -> dict[int, float]:
    """Return when each job ends, by doing what the module's first lines say."""
    left = deque(enumerate(coming))
    running: dict[int, list[int]] = {}
    ends: dict[int, float] = {}
    now_s = 0.0
    while left or running:
        if not running:
            now_s = max(now_s, left[0][1][0])
        begun = 0
        while left and left[0][1][0] <= now_s + 1e-9:
            number, (_, prompt, output) = left.popleft()
            running[number] = [prompt, output]
            begun += 1
        chunks = {number: 1 for number, (prompt, _) in running.items() if not prompt}
        for number, (prompt, _) in running.items():
            room = STEP_TOKENS - sum(chunks.values())
            if prompt and room:
                chunks[number] = min(prompt, room)
        now_s += begun * SPEED.job_s + SPEED.step_s(sum(chunks.values()))
        for number, count in chunks.items():
            one = running[number]
            if one[0]:
                one[0] -= count
            if not one[0]:
                one[1] -= 1
                if not one[1]:
                    ends[number] = now_s
                    del running[number]
    return ends
