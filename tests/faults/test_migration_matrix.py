"""Every step of a job's way and of a migration, and who is killed or frozen at it.

The verdict on what all processes wrote down: nothing lost, repeated or changed, every job ended
once, nothing left taken; and the client's tokens are the undisturbed run's. A router takes its own
requests with it: there the client gets an error behind a beginning of the same tokens, and the
verdict is about what is left behind.

`make faults` runs all; the normal run takes a sample.
"""

import os
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from itertools import product

import grpc
import pytest

from gearfall.client.request import Options
from gearfall.core.errors import GearfallError
from gearfall.core.generation.verdict import Verdict
from tests.faults.fault_cluster import (
    GREEDY,
    MODEL,
    SAMPLED,
    TOKENS,
    FaultClient,
    FaultCluster,
    Received,
    WorkerProcess,
    thaw,
)

ALL = os.environ.get("GEARFALL_FAULTS") == "all"
MOVE_AT = 40
ANSWERS = 3
"""A worker that has just come back from the case before may refuse a move or be slow about it: the
answer ends before it has come to the step, and the next one is moved."""
STEPS = ("prepare", "bulk", "delta", "freeze", "commit", "release")
VICTIMS = ("source", "target", "scheduler", "router")
SIGNALS = ("kill", "stop")
SLOW_DECODE = "engine.decode=delay:0.01"
"""Until its owner is known and the fault is armed, so that a busy client does not come too late."""
SLOW_BULK = "target.bulk=delay:0.1@1"
"""So that the source goes on meanwhile and there is a round after the first."""


@dataclass(frozen=True, slots=True)
class Case:
    """What is struck when the job's way has come to a point."""

    point: str
    victim: str
    signal: str
    ordinal: int = 1

    def __str__(self) -> str:
        return f"{self.point}-{self.victim}-{self.signal}"


MIGRATION = [
    Case(f"{victim if victim == 'target' else 'source'}.{step}", victim, signal)
    for step, victim, signal in product(STEPS, VICTIMS, SIGNALS)
] + [
    Case(f"router.{step}", "router", signal)
    for step, signal in product(("commit", "release"), SIGNALS)
]
POINTS = [
    Case(point, point.partition(".")[0], signal, ordinal)
    for (point, ordinal), signal in product(
        (
            ("worker.accept", 1),
            ("worker.submit", 1),
            ("worker.push", 30),
            ("worker.release", 1),
            ("engine.prefill", 1),
            ("engine.decode", 30),
            ("router.claim", 1),
            ("router.push", 30),
            ("router.finish", 1),
        ),
        SIGNALS,
    )
]
VERIFIED = Options(temperature=0.0, max_tokens=300, ignore_eos=True, logprobs=True)
"""A step computes the prompt and a part of the draft, a second one the rest."""
SAMPLE = {
    "source.freeze-source-kill",
    "target.commit-target-stop",
    "source.release-source-stop",
    "source.delta-scheduler-kill",
    "engine.decode-engine-stop",
    "worker.push-worker-kill",
    "router.commit-router-kill",
}


def chosen(cases: list[Case]) -> list[Case]:
    return [case for case in cases if ALL or str(case) in SAMPLE]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultCluster]:
    started = FaultCluster(tmp_path_factory.mktemp("faults"))
    verdict = None
    try:
        yield started
    finally:
        verdict = started.close()
    assert verdict.is_sound, verdict


@pytest.fixture
async def client(cluster: FaultCluster) -> AsyncIterator[FaultClient]:
    async with cluster.connected() as connected:
        yield connected


@pytest.fixture
async def before(cluster: FaultCluster, client: FaultClient) -> Verdict:
    """The verdict on all earlier cases, in which the undisturbed answer is the first."""
    cluster.arm()
    if cluster.reference is None:
        cluster.reference = await client.read(GREEDY)
        assert len(cluster.reference.token_ids) == TOKENS
    return await client.verdict()


def test_the_sample_is_of_the_matrix() -> None:
    assert {str(case) for case in MIGRATION + POINTS} >= SAMPLE
    assert len({str(case) for case in MIGRATION}) >= len(STEPS) * len(VICTIMS) * len(SIGNALS)


@pytest.mark.parametrize("case", chosen(MIGRATION), ids=str)
async def test_a_fault_while_a_job_moves(
    cluster: FaultCluster, client: FaultClient, before: Verdict, case: Case
) -> None:
    struck: list[tuple[int, str]] = []
    errors: list[str] = []

    async def strike() -> None:
        source, target, job = await client.owner()
        victim = victim_pid(cluster, case, source, target)
        struck.append((victim, job.job_id))
        rule = f"{case.point}[job={job.job_id}]={case.signal}:{victim}@{case.ordinal}"
        cluster.arm(*([SLOW_BULK] if ".delta" in case.point else []), rule)
        try:
            await client.move(source, target, job)
        except grpc.aio.AioRpcError as error:
            errors.append(str(error.details()))

    for _ in range(ANSWERS):
        cluster.arm(SLOW_DECODE)
        received = await client.read(GREEDY, at=MOVE_AT, then=strike)
        victim, job_id = struck[-1]
        if cluster.has_struck(case.point, job_id):
            break
        assert cluster.reference is not None
        assert (received.token_ids, received.error) == (cluster.reference.token_ids, None), errors
    else:
        pytest.fail(f"no job came to {case.point}: {errors}")
    await judge_case(cluster, client, before, case, received, victim)


def victim_pid(
    cluster: FaultCluster, case: Case, source: WorkerProcess, target: WorkerProcess
) -> int:
    workers = {"source": source.pid, "target": target.pid}
    return workers[case.victim] if case.victim in workers else cluster.pid_of(case.victim)


@pytest.mark.parametrize("case", chosen(POINTS), ids=str)
async def test_a_fault_on_a_jobs_way(
    cluster: FaultCluster, client: FaultClient, before: Verdict, case: Case
) -> None:
    cluster.arm(f"{case.point}={case.signal}@{case.ordinal}")
    received = await client.read(GREEDY)
    await judge_case(cluster, client, before, case, received, await cluster.struck(case.point))


async def judge_case(
    cluster: FaultCluster,
    client: FaultClient,
    before: Verdict,
    case: Case,
    received: Received,
    victim: int,
) -> None:
    """What the client got, and what was left behind once the frozen one has gone on."""
    if case.signal == "stop":
        thaw(victim)
    await client.both_ready()
    verdict = await client.verdict()
    new = set(verdict.breaches) - set(before.breaches)
    assert not new
    counts = (
        verdict.lost - before.lost,
        verdict.repeated - before.repeated,
        verdict.changed - before.changed,
    )
    assert counts == (0, 0, 0)
    assert cluster.reference is not None
    expected = cluster.reference.token_ids
    if case.victim == "router":
        assert received.token_ids == expected[: len(received.token_ids)]
        assert isinstance(received.error, GearfallError) or received.token_ids == expected
    else:
        assert received.error is None
        assert received.token_ids == expected


async def test_a_sampled_answer_goes_on_with_the_same_tokens(
    cluster: FaultCluster, client: FaultClient, before: Verdict
) -> None:
    expected = await client.read(SAMPLED)
    cluster.arm("engine.decode=kill@200")
    received = await client.read(SAMPLED)
    assert (received.token_ids, received.error) == (expected.token_ids, None)
    assert received.owners == 2
    verdict = await client.verdict()
    assert (verdict.lost, verdict.repeated, verdict.changed) == (0, 0, 0)
    assert verdict.resumes > before.resumes


@pytest.mark.parametrize(
    "rule", ["draft.verify=kill@1", "draft.verify=kill@2", "draft.accept=kill@1"]
)
@pytest.mark.parametrize(
    "options", [VERIFIED, VERIFIED | {"temperature": 1.0, "seed": 11}], ids=["greedy", "sampled"]
)
async def test_an_engine_dies_while_it_verifies_a_draft(
    cluster: FaultCluster, client: FaultClient, before: Verdict, rule: str, options: Options
) -> None:
    """The answer of a model to itself, by way of a cascade of two names for its bytes."""
    await client.stand_above("elder", cluster.source)
    expected, _ = await client.ask(MODEL, options)
    cluster.arm(rule)
    token_ids, stages = await client.ask("upward", options)
    assert cluster.last_struck_point() == rule.partition("=")[0]
    assert token_ids == expected
    assert [stage.epochs for stage in stages] == [1, 2]
    # What the first owner verified and nobody heard of is not counted; each step says one more.
    accepted = stages[1].accepted_draft_tokens
    assert stages[1].draft_tokens == accepted
    assert len(expected) - 9 <= accepted < len(expected)
    verdict = await client.verdict()
    assert (verdict.lost, verdict.repeated, verdict.changed) == (0, 0, 0)
