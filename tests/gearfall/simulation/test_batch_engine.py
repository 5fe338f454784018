"""Token time: what a batch takes, told event by event, is what the steps add up to."""

import pytest

from gearfall.core.ids import ModelName
from gearfall.simulation.agenda import EPOCH_S, Agenda
from gearfall.simulation.batch_engine import BatchEngine
from gearfall.simulation.requests import Job, Request, StageWork
from gearfall.simulation.site import EngineSpeed

SPEED = EngineSpeed(prefill_s_per_token=0.01, step_s=0.1, step_s_per_job=0.02)


def job(number: int, prompt: int = 10, output: int = 11) -> Job:
    work = StageWork(ModelName("m"), prompt, output)
    return Job(Request(number, 0.0, (work,)), 0, EPOCH_S, EPOCH_S)


class Bench:
    def __init__(self) -> None:
        self.agenda = Agenda()
        self.finished: list[tuple[int, float]] = []
        self.engine = BatchEngine(SPEED, self.agenda, self._finished)

    def _finished(self, done: Job) -> None:
        self.finished.append((done.request.number, self.agenda.now_s - EPOCH_S))

    def run(self) -> None:
        while self.agenda.step():
            pass


class Nearly:
    """Compares (job, seconds) up to rounding."""

    def __init__(self, *ends: tuple[int, float]) -> None:
        self._ends = ends

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, list)
            and [(number, pytest.approx(end_s)) for number, end_s in self._ends] == other
        )

    __hash__ = None  # type: ignore[assignment]


def test_one_job_takes_its_prompt_and_a_step_for_each_token_after_the_first():
    bench, one = Bench(), job(1)
    bench.engine.begin(one)
    bench.run()
    assert one.first_token_s - EPOCH_S == pytest.approx(0.1)
    assert bench.finished == Nearly((1, 0.1 + 10 * 0.1))


def test_two_jobs_share_the_steps_and_a_prompt_stops_them():
    bench = Bench()
    bench.engine.begin(job(1))
    bench.engine.begin(job(2))
    bench.run()
    # Both prompts first; then ten steps of two jobs.
    assert bench.finished == Nearly(
        (1, 0.2 + 10 * 0.12),
        (2, 0.2 + 10 * 0.12),
    )


def test_a_prompt_that_comes_later_pauses_those_that_decode():
    bench = Bench()
    bench.engine.begin(job(1))
    bench.agenda.at(EPOCH_S + 0.6, lambda: bench.engine.begin(job(2, prompt=50, output=2)))
    bench.run()
    # 5 of 10 steps by 0.6 s, half a second's prompt, one step together, four alone.
    assert bench.finished == Nearly((2, 1.22), (1, 1.22 + 4 * 0.1))


def test_a_removed_job_keeps_its_progress_and_goes_on_elsewhere():
    bench, other = Bench(), Bench()
    other.agenda = bench.agenda
    other.engine = BatchEngine(SPEED, bench.agenda, other._finished)
    one = job(1)
    bench.engine.begin(one)

    def move() -> None:
        bench.engine.remove(one)
        assert one.done_tokens == pytest.approx(6.0)
        other.engine.seat(one)

    bench.agenda.at(EPOCH_S + 0.6, move)
    bench.run()
    assert bench.finished == []
    assert other.finished == Nearly((1, 1.1))


def test_an_answer_of_one_token_ends_with_its_prompt():
    bench = Bench()
    bench.engine.begin(job(1, output=1))
    bench.run()
    assert bench.finished == Nearly((1, 0.1))
