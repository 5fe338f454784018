"""Steps that are told together: what waits, what is told at once, and that nothing is lost."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gearfall.core.generation.job import FinishReason, TokenRun
from gearfall.core.generation.sampling import SamplingParams
from gearfall.core.ids import Epoch, JobId
from services.worker.engine.batching.gathering import Gathering
from services.worker.engine_link.messages import (
    CancelJob,
    HoldJob,
    JobPhase,
    JobReport,
    StepDone,
    SubmitJob,
)

E = Epoch(1)
GREEDY = SamplingParams(max_tokens=100, temperature=0.0)


def submit(name, gather_s=0.02):
    return SubmitJob(JobId(name), E, (1,), (), GREEDY, gather_s=gather_s)


def run(name, index, *tokens, finish=None, **more):
    numbers = tuple(-0.5 * token for token in tokens)
    return TokenRun(
        JobId(name), E, index, tokens, numbers, numbers, finish=finish, device_s=0.5, **more
    )


def step(*runs, step_s=0.001, **more):
    return StepDone(tuple(runs), len(runs), 0, step_s, **more)


@pytest.fixture
def gathering():
    gathering = Gathering()
    for name in ("a", "b"):
        gathering.note(submit(name))
    return gathering


def test_a_job_that_gathers_nothing_is_told_at_once():
    gathering = Gathering()
    gathering.note(submit("a", gather_s=0.0))
    one = step(run("a", 0, 5))
    assert gathering.add(one, 0.0) is one


def test_tokens_wait_for_the_end_and_are_told_as_one_run(gathering):
    assert gathering.add(step(run("a", 0, 5, cached_tokens=3), step_s=0.004), 1.0) is None
    assert gathering.add(step(run("a", 1, 6, 7, draft_tokens=2), step_s=0.002), 1.005) is None
    told = gathering.add(step(run("a", 3, 8, finish=FinishReason.STOP), step_s=0.001), 1.01)
    (whole,) = told.runs
    assert (whole.index, whole.token_ids, whole.finish) == (0, (5, 6, 7, 8), FinishReason.STOP)
    assert whole.logprobs == whole.margins == (-2.5, -3.0, -3.5, -4.0)
    assert (whole.cached_tokens, whole.draft_tokens, whole.device_s) == (3, 2, 1.5)
    assert whole.held_s == pytest.approx(0.01)
    assert (told.earlier_step_s, told.step_s) == ((0.004, 0.002), 0.001)
    gathering.check()


def test_the_oldest_token_waits_no_longer_than_its_job_says(gathering):
    assert gathering.add(step(run("a", 0, 5)), 1.0) is None
    assert gathering.add(step(run("a", 1, 6)), 1.018) is None
    assert gathering.add(step(run("a", 2, 7)), 1.021).runs[0].token_ids == (5, 6, 7)


def test_nothing_waits_for_a_step_that_would_end_too_late(gathering):
    slow = step(run("a", 0, 5), step_s=0.3)
    assert gathering.add(slow, 1.0) is slow
    assert gathering.add(step(run("a", 1, 6), step_s=0.009), 2.0) is None
    assert gathering.add(step(run("a", 2, 7), step_s=0.012), 2.012).runs[0].token_ids == (6, 7)


REPORT = JobReport(JobId("c"), E, JobPhase.HELD)


@pytest.mark.parametrize(
    "last",
    [
        step(run("b", 4, 9, finish=FinishReason.LENGTH)),
        step(run("c", 0, 9)),
        step(reports=(REPORT,)),
        step(),
    ],
    ids=["another's end", "one that does not gather", "a report", "nothing"],
)
def test_what_may_not_wait_takes_the_rest_with_it_in_order(gathering, last):
    assert gathering.add(step(run("a", 0, 5)), 1.0) is None
    told = gathering.add(last, 1.001)
    assert [(each.job_id, each.token_ids) for each in told.runs[:1]] == [("a", (5,))]
    assert told.runs[1:] == last.runs
    assert told.reports == last.reports
    assert gathering.take(2.0) is None


@pytest.mark.parametrize("finish", [FinishReason.ERROR, FinishReason.DEADLINE])
def test_an_end_that_gives_no_answer_leaves_the_tokens_before_it_a_run(gathering, finish):
    gathering.add(step(run("a", 0, 5)), 1.0)
    told = gathering.add(step(run("a", 1, finish=finish, error="why")), 1.001)
    assert [each.token_ids for each in told.runs] == [(5,), ()]
    assert [each.finish for each in told.runs] == [None, finish]


def test_a_job_that_another_worker_sent_gathers_and_a_cancelled_one_no_more():
    gathering = Gathering()
    gathering.note(HoldJob(submit("a")))
    assert gathering.add(step(run("a", 0, 5)), 1.0) is None
    gathering.note(CancelJob(JobId("a"), E))
    assert gathering.add(step(run("a", 1, 6)), 1.001) is not None


def test_a_job_that_ended_beside_a_report_gathers_no_more(gathering):
    end = step(run("a", 0, 5, finish=FinishReason.STOP), reports=(REPORT,))
    assert gathering.add(end, 1.0) is end
    late = step(run("a", 1, 6))
    assert gathering.add(late, 1.001) is late


def test_what_a_cancelled_submission_computed_is_not_told_with_the_next_one(gathering):
    gathering.add(step(run("a", 0, 5), run("b", 0, 1)), 1.0)
    gathering.add(step(run("a", 1, 6)), 1.001)
    gathering.note(CancelJob(JobId("a"), E))
    gathering.check()
    gathering.note(submit("a"))
    gathering.add(step(run("a", 0, 5)), 1.002)
    told = gathering.add(step(run("a", 1, 6), run("b", 1, 2, finish=FinishReason.STOP)), 1.003)
    said = {each.job_id: (each.index, each.token_ids) for each in told.runs}
    assert len(told.runs) == 2
    assert said == {"a": (0, (5, 6)), "b": (0, (1, 2))}
    assert len(told.earlier_step_s) == 3


def test_a_run_that_does_not_follow_the_one_before_it_stays_apart(gathering):
    """A step that was under way when its job was cancelled may end behind the next submission."""
    gathering.add(step(run("a", 7, 5)), 1.0)
    gathering.add(step(run("a", 0, 9)), 1.001)
    told = gathering.add(step(run("a", 1, 8)), 1.03)
    assert [(each.index, each.token_ids) for each in told.runs] == [(7, (5,)), (0, (9, 8))]


STEPS = st.lists(
    st.tuples(
        st.lists(st.sampled_from("abc"), unique=True, max_size=3),
        st.integers(1, 3),
        st.floats(0.0, 0.03),
    ),
    max_size=20,
)


@given(STEPS, st.sets(st.sampled_from("abc")))
def test_every_token_is_told_once_in_order_and_in_time(steps, gathers):
    gathering, now_s, tokens = Gathering(), 0.0, dict.fromkeys("abc", 0)
    for name in gathers:
        gathering.note(submit(name))
    told: dict[str, list[int]] = {name: [] for name in "abc"}
    waiting_since: dict[str, float] = {}

    def take(done, unforeseen_s):
        for each in done.runs:
            assert each.index == len(told[each.job_id])
            told[each.job_id] += each.token_ids
            since_s = waiting_since.pop(each.job_id)
            assert now_s - since_s <= 0.02 + unforeseen_s + 1e-9

    last_s = 0.0
    for names, count, step_s in steps:
        now_s += step_s
        runs = []
        for name in names:
            runs.append(run(name, tokens[name], *range(tokens[name], tokens[name] + count)))
            tokens[name] += count
            waiting_since.setdefault(name, now_s)
        done = gathering.add(step(*runs, step_s=step_s), now_s)
        gathering.check()
        if done is not None:
            take(done, max(0.0, step_s - last_s))
        last_s = step_s
        assert all(now_s - since_s + step_s < 0.02 for since_s in waiting_since.values())
        assert waiting_since.keys() <= gathers
    rest = gathering.take(now_s)
    if rest is not None:
        take(rest, 0.0)
    assert told == {name: list(range(count)) for name, count in tokens.items()}
