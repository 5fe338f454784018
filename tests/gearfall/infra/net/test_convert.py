"""What crosses the wire comes back equal; what breaks a limit is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gearfall.core.certainty.self_consistency import SelfConsistency
from gearfall.core.errors import InvalidRequest
from gearfall.core.generation.job import FinishReason, Job, Priority, TokenAlternative, TokenRun
from gearfall.core.generation.sampling import SamplingParams
from gearfall.core.ids import (
    DeploymentName,
    Epoch,
    JobId,
    ModelName,
    NodeId,
    RequestId,
    RouterId,
    WorkerId,
)
from gearfall.core.records import DeploymentRecord, ReplicaRecord, ReplicaState, Stage
from gearfall.infra.net import convert
from gearfall.pb import common_pb2 as pb

floats32 = st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-1e6, max_value=0)
token_ids = st.lists(st.integers(0, 2**32 - 1), max_size=20).map(tuple)
samplings = st.builds(
    SamplingParams,
    max_tokens=st.integers(1, 2**32 - 1),
    temperature=st.floats(0, 2, width=32),
    top_p=st.floats(0.125, 1, width=32),
    top_k=st.integers(0, 2**32 - 1),
    seed=st.integers(0, 2**64 - 1),
    stop_token_ids=st.lists(st.integers(0, 100), max_size=8).map(tuple),
    top_logprobs=st.integers(0, 20),
    ignore_eos=st.booleans(),
)
texts = st.text(min_size=1, max_size=20)
jobs = st.builds(
    Job,
    job_id=texts.map(JobId),
    request_id=texts.map(RequestId),
    model=texts.map(ModelName),
    epoch=st.integers(1, 2**32 - 1).map(Epoch),
    router_id=texts.map(RouterId),
    router_address=texts,
    prompt_token_ids=token_ids,
    generated_token_ids=token_ids,
    sampling=samplings,
    deadline_unix_s=st.floats(0, 1e12),
    priority=st.sampled_from(Priority),
    tenant=st.text(max_size=8),
    enqueued_unix_s=st.floats(0, 1e12),
    adapter=st.text(max_size=8),
    draft_token_ids=token_ids,
    gather_s=st.floats(0, 9),
)


@st.composite
def token_runs(draw: st.DrawFn) -> TokenRun:
    count = draw(st.integers(0, 5))
    per_token = st.lists(floats32, min_size=count, max_size=count).map(tuple)
    alternatives = st.lists(
        st.builds(TokenAlternative, st.integers(0, 2**32 - 1), floats32), max_size=3
    ).map(tuple)
    return TokenRun(
        JobId("j"),
        Epoch(draw(st.integers(1, 9))),
        draw(st.integers(0, 2**31)),
        draw(st.lists(st.integers(0, 99), min_size=count, max_size=count).map(tuple)),
        draw(per_token),
        draw(per_token),
        draw(st.lists(alternatives, min_size=count, max_size=count).map(tuple)),
        draw(st.none() | st.sampled_from(FinishReason)),
        draw(st.text(max_size=9)),
        draw(st.integers(0, 2**31)),
        draw(st.integers(0, 2**31)),
        draw(st.integers(0, 2**31)),
        draw(st.floats(0, 9)),
        draw(st.floats(0, 9)),
    )


@given(jobs)
def test_a_job_comes_back_equal(job: Job) -> None:
    message = pb.Job.FromString(convert.job_to_pb(job).SerializeToString())
    assert convert.job_from_pb(message) == job


@given(token_runs())
def test_a_token_run_comes_back_equal(run: TokenRun) -> None:
    message = pb.TokenRun.FromString(convert.token_run_to_pb(run).SerializeToString())
    assert convert.token_run_from_pb(message) == run


@pytest.mark.parametrize("field", ["job_id", "model", "epoch", "router_id", "router_address"])
def test_a_job_without_an_owner_or_a_name_is_refused(field: str) -> None:
    message = pb.Job(
        job_id="j", model="m", epoch=1, router_id="r", router_address="a:1",
        sampling=pb.SamplingParams(max_tokens=1, top_p=1),
    )  # fmt: skip
    convert.job_from_pb(message)
    message.ClearField(field)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest) as caught:
        convert.job_from_pb(message)
    assert caught.value.param == field


@pytest.mark.parametrize(
    "message",
    [
        pb.TokenRun(token_ids=[1, 2], logprobs=[0.0]),
        pb.TokenRun(token_ids=[1], logprobs=[0.0]),
        pb.TokenRun(
            token_ids=[1, 2],
            logprobs=[0, 0],
            margins=[0, 0],
            alternatives=[pb.TokenAlternatives()],
        ),
        pb.TokenRun(finish=99),  # type: ignore[arg-type]
    ],
)
def test_a_token_run_with_holes_is_refused(message: pb.TokenRun) -> None:
    with pytest.raises(InvalidRequest):
        convert.token_run_from_pb(message)


@pytest.mark.parametrize("several", [None, SelfConsistency(2), SelfConsistency(8, 1.3)])
def test_how_a_stage_asks_crosses_the_wire(several: SelfConsistency | None) -> None:
    stages = (Stage(ModelName("small"), 0.5, several), Stage(ModelName("large")))
    record = DeploymentRecord(DeploymentName("both"), stages)
    assert convert.deployment_from_pb(convert.deployment_to_pb(record)) == record


def test_a_replica_says_how_busy_and_how_slow_it_is():
    where = WorkerId("w"), NodeId("n"), ModelName("m")
    record = ReplicaRecord(*where, ReplicaState.READY, 16, 3, 99, 2**20, 0.0, slowdown=1.25)
    found = convert.replica_to_pb(record)
    assert (found.model, found.worker_id, found.node_id) == ("m", "w", "n")
    assert found.state == pb.REPLICA_STATE_READY
    assert (found.running_jobs, found.slots, found.pid) == (3, 16, 99)
    assert (found.memory_bytes, found.slowdown) == (2**20, 1.25)
