"""Steps that wait for the stream travel together, and nothing changes its place."""

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gearfall.pb import common_pb2
from gearfall.pb import router_pb2 as pb
from services.worker.jobs.push_stream import join_steps


def step(*indexes: int) -> pb.WorkerPush:
    runs = [pb.StepTokens().runs.add(job_id="a", index=index) for index in indexes]
    return pb.WorkerPush(step=pb.StepTokens(runs=runs))


def claim(job: str) -> pb.WorkerPush:
    return pb.WorkerPush(claim=pb.JobClaim(job_id=job))


def lost(job: str) -> pb.WorkerPush:
    return pb.WorkerPush(lost=pb.JobLost(job_id=job))


@pytest.mark.parametrize(
    ("pushes", "expected"),
    [
        ([], []),
        ([step(0)], [step(0)]),
        ([step(0), step(1, 2), step(3)], [step(0, 1, 2, 3)]),
        ([step(0), claim("b"), step(1)], [step(0), claim("b"), step(1)]),
        ([claim("a"), step(0), step(1), lost("a")], [claim("a"), step(0, 1), lost("a")]),
    ],
)
def test_only_steps_that_follow_each_other_are_joined(
    pushes: list[pb.WorkerPush], expected: list[pb.WorkerPush]
) -> None:
    assert join_steps(pushes) == expected


def test_claims_that_came_with_steps_stay_before_their_tokens() -> None:
    first, second = step(0), step(1)
    first.step.claims.add(job_id="a")
    second.step.claims.add(job_id="b")
    (joined,) = join_steps([first, second])
    assert [claim.job_id for claim in joined.step.claims] == ["a", "b"]


@given(st.lists(st.sampled_from(["step", "claim", "lost"])))
def test_order_is_kept_and_no_two_steps_stay_apart(kinds: list[str]) -> None:
    make = {"step": step, "claim": lambda i: claim(str(i)), "lost": lambda i: lost(str(i))}
    joined = join_steps([make[kind](i) for i, kind in enumerate(kinds)])
    flat = [
        index
        for push in joined
        for index in (
            [run.index for run in push.step.runs]
            if push.HasField("step")
            else [int(push.claim.job_id or push.lost.job_id)]
        )
    ]
    assert flat == list(range(len(kinds)))
    is_step = [push.HasField("step") for push in joined]
    assert (True, True) not in pairwise(is_step)


def run(index: int, *tokens: int, job: str = "a", finish: int = 0, top: bool = False) -> Any:
    made = pb.StepTokens().runs.add(job_id=job, epoch=1, index=index, finish=finish)
    made.token_ids.extend(tokens)
    made.logprobs.extend(-0.5 for _ in tokens)
    made.margins.extend(1.0 for _ in tokens)
    for _ in tokens if top else ():
        made.alternatives.add()
    return made


def steps(*runs: Any) -> list[Any]:
    joined = join_steps([pb.WorkerPush(step=pb.StepTokens(runs=[each])) for each in runs])
    return [each for push in joined for each in push.step.runs]


STOP, LENGTH, ERROR = (
    common_pb2.FINISH_REASON_STOP,
    common_pb2.FINISH_REASON_LENGTH,
    common_pb2.FINISH_REASON_ERROR,
)


@pytest.mark.parametrize(
    ("runs", "expected"),
    [
        ([run(0, 7), run(1, 8)], [run(0, 7, 8)]),
        ([run(0, 7), run(0, 9, job="b"), run(1, 8)], [run(0, 7, 8), run(0, 9, job="b")]),
        ([run(3, 7), run(4, 8, finish=STOP)], [run(3, 7, 8, finish=STOP)]),
        ([run(0, 7, top=True), run(1, 8, top=True)], [run(0, 7, 8, top=True)]),
    ],
)
def test_a_jobs_consecutive_runs_become_one(runs: list[Any], expected: list[Any]) -> None:
    assert steps(*runs) == expected


@pytest.mark.parametrize(
    "runs",
    [
        [run(0, 7), run(2, 8)],
        [run(0, 7), run(0, 7)],
        [run(0, 7, finish=LENGTH), run(1, 8)],
        [run(0, 7), run(1, 8, finish=ERROR)],
        [run(0, 7), run(1, finish=STOP)],
        [run(0, 7, top=True), run(1, 8)],
    ],
)
def test_what_is_not_one_run_stays_apart(runs: list[Any]) -> None:
    assert steps(*runs) == runs


def test_the_device_time_of_joined_runs_is_their_sum() -> None:
    pushes = [
        pb.WorkerPush(step=pb.StepTokens(runs=[run]))
        for run in (
            common_pb2.TokenRun(
                job_id="a", index=at, token_ids=[7], logprobs=[-1.0], margins=[1.0], device_s=0.25
            )
            for at in range(3)
        )
    ]
    (joined,) = join_steps(pushes)
    (run,) = joined.step.runs
    assert (list(run.token_ids), run.device_s) == ([7, 7, 7], 0.75)


def test_the_drafts_of_joined_runs_are_counted_together() -> None:
    verified = common_pb2.TokenRun(draft_tokens=16, accepted_draft_tokens=2)
    first, second = run(0, 7, 8, 9), run(3, 4)
    first.MergeFrom(verified)
    second.MergeFrom(common_pb2.TokenRun(draft_tokens=5))
    (joined,) = steps(first, second)
    assert list(joined.token_ids) == [7, 8, 9, 4]
    assert (joined.draft_tokens, joined.accepted_draft_tokens) == (21, 2)
