import pytest
from hypothesis import given
from hypothesis import strategies as st

from gearfall.core.generation.job import Job, Priority
from gearfall.core.generation.sampling import SamplingParams
from gearfall.core.ids import Epoch, JobId, ModelName, RequestId, RouterId
from services.router.jobs.backlog import Backlog, WaitingJobs, has_changed_much


def job(name, *, prompt=10, most=20, priority=Priority.INTERACTIVE) -> Job:
    return Job(
        JobId(name),
        RequestId("request"),
        ModelName("small"),
        Epoch(1),
        RouterId("router-a"),
        "127.0.0.1:1",
        tuple(range(prompt)),
        (),
        SamplingParams(max_tokens=most),
        priority=priority,
    )


def test_what_waits_is_added_up_and_the_oldest_is_named():
    waiting = WaitingJobs()
    assert waiting.add(job("a", prompt=5, most=50), 0, 100.0)
    assert waiting.add(job("b", priority=Priority.BATCH), 4, 101.0)
    assert not waiting.add(job("a"), 0, 102.0)
    assert waiting.backlog() == Backlog(2, 100.0, 5 + 14, 50 + 16, 1, 100.0)
    assert waiting.discard(JobId("a"))
    assert not waiting.discard(JobId("a"))
    assert waiting.backlog() == Backlog(1, 101.0, 14, 16, 1)
    assert waiting.discard(JobId("b"))
    assert waiting.backlog() == Backlog()


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5), st.integers(0, 30), st.booleans())))
def test_sums_hold_whoever_comes_and_goes(steps):
    waiting = WaitingJobs()
    present: dict[str, float] = {}
    batch: set[str] = set()
    for at, (comes, number, generated, is_batch) in enumerate(steps):
        name = f"job-{number}"
        if comes:
            priority = Priority.BATCH if is_batch else Priority.INTERACTIVE
            assert waiting.add(job(name, priority=priority), generated, float(at)) == (
                name not in present
            )
            if name not in present:
                (batch.add if is_batch else batch.discard)(name)
            present.setdefault(name, float(at))
        else:
            assert waiting.discard(JobId(name)) == (present.pop(name, None) is not None)
        waiting.check()
        backlog = waiting.backlog()
        assert backlog.jobs == len(waiting) == len(present)
        assert backlog.since_unix_s == min(present.values(), default=0.0)
        assert set(waiting.job_ids()) == set(present)
        others = [since for name, since in present.items() if name not in batch]
        assert backlog.interactive_since_unix_s == min(others, default=0.0)


@pytest.mark.parametrize(
    ("said", "now", "is_much"),
    [
        (Backlog(4, 9.0), Backlog(5, 9.0), False),
        (Backlog(4, 9.0), Backlog(6, 9.0), True),
        (Backlog(4, 9.0), Backlog(2, 9.0), True),
        (Backlog(1, 9.0), Backlog(2, 9.0), True),
        (Backlog(100, 9.0), Backlog(120, 9.0), False),
        (Backlog(9, 9.0), Backlog(9, 9.9), False),
        (Backlog(9, 9.0), Backlog(9, 10.0), True),
        (Backlog(9, 9.0, 100, 400), Backlog(9, 9.0, 126, 400), True),
        (Backlog(9, 9.0, 100, 400), Backlog(9, 9.0, 100, 501), True),
        (Backlog(9, 9.0, 100, 400), Backlog(9, 9.0, 125, 500), False),
        (Backlog(9, 9.0), Backlog(9, 9.0, batch_jobs=1), True),
    ],
)
def test_what_is_worth_telling_again(said, now, is_much):
    assert has_changed_much(said, now) is is_much
