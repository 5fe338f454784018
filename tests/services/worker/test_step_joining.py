"""Steps that wait for the stream travel together, and nothing changes its place."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gearfall.pb import router_pb2 as pb
from services.worker.push_stream import join_steps


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
