"""Jobs wait for their adapter, get it, or end with the reason; unneeded leases end."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import ExitStack

import pytest

from gearfall.core.errors import CorruptCheckpoint, GearfallError, NotFound, Unavailable
from gearfall.core.generation.job import FinishReason, TokenRun
from gearfall.core.generation.sampling import SamplingParams
from gearfall.core.ids import Epoch, JobId, ModelName
from services.worker.engine_link.messages import (
    AdapterReport,
    AttachAdapter,
    CancelJob,
    DropAdapter,
    FeedJob,
    HoldJob,
    JobPhase,
    StepDone,
    SubmitJob,
)
from services.worker.processes.adapter_engine import AdapterEngine, adapting
from services.worker.processes.adapter_leases import AdapterLimits
from services.worker.processes.adapter_source import RETRY_DELAYS_S, Brought, StoreAdapters
from services.worker.processes.zygote_client import Zygote
from tests.services.worker.engine.model.test_adapters import Bench
from tests.services.worker.fakes import WORKER, FakeEngine, Watched
from tests.services.worker.processes.test_zygote import start_message

EPOCH = Epoch(1)


class Lease:
    def __init__(self, digest: str) -> None:
        self.manifest_json = digest.encode()
        self.partition_fds = (0,)
        self.is_closed = False

    def close(self) -> None:
        self.is_closed = True


class Source(Watched):
    """Brings an adapter when the test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: dict[str, asyncio.Future[Brought]] = {}
        self.leases: dict[str, Lease] = {}

    async def __call__(self, adapter: ModelName) -> Brought:
        self.asked[adapter] = asyncio.get_running_loop().create_future()
        self.notify()
        try:
            return await self.asked[adapter]
        finally:
            del self.asked[adapter]

    async def until_asked(self, name: str) -> None:
        await self.until(lambda: name in self.asked)

    async def bring(self, name: str, *, size_bytes: int = 1) -> None:
        await self.until_asked(name)
        self.leases[name] = Lease(f"digest-{name}")
        self.asked[name].set_result(Brought(f"digest-{name}", size_bytes, b"{}", self.leases[name]))

    async def fail(self, name: str, error: Exception) -> None:
        await self.until_asked(name)
        self.asked[name].set_exception(error)


def submit(job: str, adapter: str = "", generated: int = 0) -> SubmitJob:
    sampling = SamplingParams(max_tokens=8)
    return SubmitJob(JobId(job), EPOCH, (1,), (5,) * generated, sampling, adapter=adapter)


def end(job: str) -> TokenRun:
    return TokenRun(JobId(job), EPOCH, 0, finish=FinishReason.STOP)


class Rig:
    def __init__(self, limits: AdapterLimits | None = None) -> None:
        self.engine, self.source = FakeEngine(7), Source()
        self.changes: list[tuple[str, ...]] = []
        self.adapted = AdapterEngine(
            self.engine, self.source, on_change=self._on_change, limits=limits
        )
        self.steps = aiter(self.adapted)

    def _on_change(self) -> None:
        self.changes.append(self.adapted.adapters)

    @property
    def sent(self) -> list[object]:
        return self.engine.sent

    async def sent_all(self, count: int) -> list[object]:
        await self.engine.until(lambda: len(self.sent) >= count)
        self.adapted.check()
        return self.sent

    async def close(self) -> None:
        self.engine.kill()
        await self.adapted.close()
        assert all(lease.is_closed for lease in self.source.leases.values())


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    rig = Rig()
    yield rig
    await rig.close()


async def test_jobs_wait_for_one_fetch_and_others_do_not(rig: Rig):
    for job in (submit("a", "x"), submit("b", "x"), submit("c")):
        rig.adapted.send(job)
    assert rig.sent == [submit("c")]
    await rig.source.bring("x")
    sent = await rig.sent_all(4)
    assert isinstance(sent[1], AttachAdapter)
    assert (sent[1].adapter, sent[1].name) == ("digest-x", "x")
    assert sent[2:] == [submit("a", "digest-x"), submit("b", "digest-x")]
    rig.adapted.send(submit("d", "x"))
    assert rig.sent[-1] == submit("d", "digest-x")
    assert rig.changes == [("x",)]


async def test_what_is_said_about_a_waiting_job_waits_with_it(rig: Rig):
    hold = HoldJob(submit("a", "x"))
    feed = FeedJob(JobId("a"), EPOCH, 0, (4,))
    for message in (hold, feed, submit("b", "x"), CancelJob(JobId("b"), EPOCH)):
        rig.adapted.send(message)
    assert rig.sent == []
    await rig.source.bring("x")
    sent = await rig.sent_all(3)
    assert sent[1:] == [HoldJob(submit("a", "digest-x")), feed]


async def test_a_cancelled_job_is_cancelled_in_the_engine_too(rig: Rig):
    rig.adapted.send(submit("a", "x"))
    await rig.source.bring("x")
    await rig.sent_all(2)
    cancel = CancelJob(JobId("a"), EPOCH)
    rig.adapted.send(cancel)
    assert rig.sent[-1] == cancel
    rig.adapted.check()


@pytest.mark.parametrize("error", [NotFound("it is gone"), CorruptCheckpoint("it is rotten")])
async def test_a_job_whose_adapter_can_not_be_had_ends_with_the_reason(
    rig: Rig, error: GearfallError
):
    rig.adapted.send(submit("a", "x", generated=3))
    rig.adapted.send(HoldJob(submit("b", "x")))
    await rig.source.fail("x", error)
    step = await anext(rig.steps)
    (run,), (report,) = step.runs, step.reports
    assert (run.job_id, run.index, run.finish) == ("a", 3, FinishReason.ERROR)
    assert error.message in run.error
    assert (report.job_id, report.phase) == ("b", JobPhase.REFUSED)
    assert (rig.sent, rig.adapted.adapters) == ([], ())
    rig.adapted.send(submit("c", "x"))
    await rig.source.bring("x")
    assert (await rig.sent_all(2))[-1] == submit("c", "digest-x")


async def test_an_adapter_that_the_engine_refuses_is_given_back(rig: Rig):
    rig.adapted.send(submit("a", "x"))
    await rig.source.bring("x")
    await rig.sent_all(2)
    report = AdapterReport("digest-x", "its shapes differ")
    rig.engine._steps.put_nowait(StepDone((end("a"),), 0, 0, 0.0, adapters=(report,)))
    assert (await anext(rig.steps)).runs == (end("a"),)
    assert rig.source.leases["x"].is_closed
    assert rig.adapted.adapters == ()
    rig.adapted.check()


async def test_unused_adapters_go_when_there_are_too_many():
    rig = Rig(AdapterLimits(count=1))
    for job, name in (("a", "x"), ("b", "y")):
        rig.adapted.send(submit(job, name))
        await rig.source.bring(name)
    await rig.sent_all(4)
    assert rig.adapted.adapters == ("x", "y")
    rig.engine.step(end("a"))
    await anext(rig.steps)
    assert rig.sent[-1] == DropAdapter("digest-x")
    assert rig.source.leases["x"].is_closed
    assert not rig.source.leases["y"].is_closed
    rig.adapted.check()
    await rig.close()


async def test_a_removed_adapter_goes_with_its_last_job(rig: Rig):
    rig.adapted.send(submit("a", "x"))
    await rig.source.bring("x")
    await rig.sent_all(2)
    rig.adapted.retire(lambda name, digest: (name, digest) == ("x", "digest-x"))
    rig.adapted.retire(lambda name, digest: False)
    assert not rig.source.leases["x"].is_closed
    rig.engine.step(end("a"))
    await anext(rig.steps)
    assert (rig.adapted.adapters, rig.changes[-1]) == ((), ())
    assert rig.source.leases["x"].is_closed


async def test_an_adapter_that_was_removed_on_its_way_does_not_stay(rig: Rig):
    rig.adapted.send(submit("a", "x"))
    rig.adapted.retire(lambda name, digest: False)
    await rig.source.bring("x")
    await rig.sent_all(2)
    rig.engine.step(end("a"))
    await anext(rig.steps)
    assert (rig.adapted.adapters, rig.sent[-1]) == ((), DropAdapter("digest-x"))


async def test_one_pair_of_bytes_under_two_names_is_dropped_with_the_second(rig: Rig):
    for job, name in (("a", "x"), ("b", "y")):
        rig.adapted.send(submit(job, name))
        await rig.source.until_asked(name)
        rig.source.leases[name] = Lease("same")
        brought = Brought("same", 1, b"{}", rig.source.leases[name])
        rig.source.asked[name].set_result(brought)
    await rig.sent_all(4)
    for job, sent in (("a", None), ("b", DropAdapter("same"))):
        rig.adapted.retire(lambda name, digest: False)
        rig.engine.step(end(job))
        await anext(rig.steps)
        assert (rig.sent[-1] if isinstance(rig.sent[-1], DropAdapter) else None) == sent


async def test_the_steps_end_with_the_engine(rig: Rig):
    rig.adapted.send(submit("a", "x"))
    rig.engine.kill()
    assert [step async for step in rig.steps] == []


class Store:
    """A store that is away for a while."""

    def __init__(self, failures: int) -> None:
        self.failures = failures

    async def read_file(self, model: ModelName, file: str) -> bytes:
        self.failures -= 1
        if self.failures >= 0:
            raise Unavailable("the store is away")
        raise NotFound(f"{model} has no {file}")


@pytest.mark.parametrize(
    ("failures", "error", "slept"),
    [(2, NotFound, RETRY_DELAYS_S[:2]), (99, Unavailable, RETRY_DELAYS_S)],
)
async def test_a_store_that_is_away_is_asked_again(
    failures: int, error: type[GearfallError], slept: tuple[float, ...]
):
    pauses: list[float] = []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)

    source = StoreAdapters(Store(failures), None, WORKER, sleep=sleep)  # type: ignore[arg-type]
    with pytest.raises(error):
        await source(ModelName("x"))
    assert tuple(pauses) == slept


async def test_a_real_engine_takes_two_adapters_and_gives_their_tokens(
    tmp_path_factory: pytest.TempPathFactory,
):
    """Descriptors go over the running engine's socket; three jobs share its batch."""
    greedy = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    with ExitStack() as stack:
        bench = Bench("llama", tmp_path_factory.mktemp("base"), stack)
        by_name = {ModelName(str(n)): adapter for n, adapter in enumerate(bench.adapters)}

        async def bring(name: ModelName) -> Brought:
            adapter = by_name[name]
            return Brought(adapter.digest, 1, adapter.config_json, MemoryLease(adapter))

        zygote = Zygote()
        await zygote.start()
        fds = bench.checkpoint.partition_fds
        engine = await zygote.spawn(start_message(bench.checkpoint), fds)
        async with adapting(engine, bring, lambda: None) as adapted:
            answers: dict[str, list[int]] = {}
            for name in ("", *by_name):
                job = JobId(f"job-{name}")
                answers[job] = []
                adapted.send(SubmitJob(job, EPOCH, (5, 9, 1), (), greedy, adapter=name))
            ended = 0
            async for step in adapted:
                for run in step.runs:
                    assert not run.error
                    answers[run.job_id] += run.token_ids
                    ended += run.finish is not None
                if ended == len(answers):
                    break
        await zygote.stop()
        for name, adapter in (("", None), *by_name.items()):
            tokens = [5, 9, 1]
            for _ in range(8):
                tokens.append(int(bench.merged_logits(tokens, adapter).argmax()))
            assert answers[f"job-{name}"] == tokens[3:]


class MemoryLease:
    def __init__(self, adapter) -> None:
        self.manifest_json = adapter.manifest_json
        self.partition_fds = adapter.partition_fds

    def close(self) -> None:
        """The descriptors are the test's."""
