"""Jobs on the vLLM engine, against a double of vLLM's public API."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from gearfall.core.generation.job import FinishReason, Priority, TokenRun
from gearfall.core.ids import JobId
from services.worker.engine.vllm_jobs import VllmJobs
from services.worker.engine.vllm_library import VllmEngine
from services.worker.engine_link.messages import (
    AttachAdapter,
    CancelJob,
    FeedJob,
    FreezeJob,
    HoldJob,
    JobPhase,
    JobReport,
    PinJob,
    ProbeEngine,
    ReleaseJob,
    StepDone,
    ThawJob,
    UnpinJob,
)
from tests.services.worker.counting_model import answer
from tests.services.worker.engine.vllm_double import (
    VOCABULARY,
    AsyncLLM,
    CompletionOutput,
    RequestOutput,
    library,
)
from tests.services.worker.engine.vllm_submissions import EPOCH, PROMPT, submit


class Rig:
    def __init__(self, llm: AsyncLLM, unix_s: float = 1000.0) -> None:
        self.llm = llm
        self.steps: list[StepDone] = []
        self._changed = asyncio.Event()
        self.jobs = VllmJobs(
            VllmEngine(llm, library(llm), VOCABULARY),
            self._emit,
            total_tokens=64,
            vocabulary_size=VOCABULARY,
            unix_clock=lambda: unix_s,
        )

    def _emit(self, step: StepDone) -> None:
        self.steps.append(step)
        self.jobs.check()
        self._changed.set()

    @property
    def runs(self) -> list[TokenRun]:
        return [run for step in self.steps for run in step.runs]

    def tokens(self, job: str) -> list[int]:
        runs = [run for run in self.runs if run.job_id == job]
        found = [token for run in runs for token in run.token_ids]
        assert [run.index for run in runs if run.token_ids] == list(
            range(runs[0].index, runs[0].index + len(found))
        )
        return found

    def reports(self, phase: JobPhase) -> list[JobReport]:
        found = [report for step in self.steps for report in step.reports]
        return [report for report in found if report.phase is phase]

    async def until(self, holds: Any) -> None:
        async with asyncio.timeout(10):
            while not holds():
                self._changed.clear()
                await self._changed.wait()

    async def ended(self, count: int = 1) -> list[TokenRun]:
        def find() -> list[TokenRun]:
            return [run for run in self.runs if run.finish is not None]

        await self.until(lambda: len(find()) >= count)
        return find()


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    rig = Rig(AsyncLLM())
    yield rig
    await rig.jobs.stop()


@pytest.fixture
async def stepped() -> AsyncIterator[Rig]:
    rig = Rig(AsyncLLM(is_stepped=True))
    yield rig
    await rig.jobs.stop()


async def test_jobs_are_answered_with_logprobs_margins_and_alternatives(rig: Rig):
    rig.jobs.handle(submit("a", sampling={"top_logprobs": 3}, tenant="t"))
    rig.jobs.handle(submit("b", generated=answer(PROMPT, 2), priority=Priority.BATCH))
    ends = await rig.ended(2)
    assert [run.finish for run in ends] == [FinishReason.LENGTH] * 2
    assert rig.tokens("a") == answer(PROMPT, 6)
    assert rig.tokens("b") == answer(PROMPT, 6)[2:]
    run = rig.runs[0]
    assert len(run.alternatives[0]) == 3
    assert run.alternatives[0][0].token_id == run.token_ids[0]
    assert run.alternatives[0][0].logprob == run.logprobs[0]
    assert run.margins[0] == pytest.approx(run.logprobs[0] - run.alternatives[0][1].logprob)
    assert all(run.alternatives == () for run in rig.runs if run.job_id == "b")


async def test_jobs_share_the_engines_time_and_tell_all_of_it(rig: Rig):
    for number in range(4):
        rig.jobs.handle(submit(f"job-{number}", tokens=3 + number))
    await rig.ended(4)
    told = {run.job_id: 0.0 for run in rig.runs}
    for run in rig.runs:
        told[run.job_id] += run.device_s
    assert all(seconds > 0 for seconds in told.values())
    shares = rig.jobs.shares
    assert sum(told.values()) + shares.dropped_s == pytest.approx(shares.busy_s)


async def test_what_vllm_is_asked(rig: Rig):
    sampling = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 0, "seed": 7, "stop_token_ids": (2,),
    }  # fmt: skip
    rig.jobs.handle(submit("a", sampling=sampling, tenant="t"))
    rig.jobs.handle(submit("b", generated=(9, 9), sampling=sampling, priority=Priority.BATCH))
    await rig.ended(2)
    (prompt, params, request_id, priority), second = rig.llm.requests[:2]
    assert prompt == {
        "type": "token", "prompt_token_ids": list(PROMPT), "cache_salt": "tenant:t",
    }  # fmt: skip
    assert params == {
        "max_tokens": 6, "temperature": 0.5, "top_p": 0.9, "top_k": -1, "seed": 7,
        "stop_token_ids": [2], "ignore_eos": True, "logprobs": 2, "detokenize": False,
        "output_kind": "delta",
    }  # fmt: skip
    assert (request_id.startswith("a/1/"), priority) == (True, 0)
    assert (second[1]["max_tokens"], second[3]) == (4, 1)
    assert second[1]["seed"] not in {7, None}, "a continuation must not draw the same again"


@pytest.mark.parametrize("tokens_at_once", [1, 3])
async def test_stop_tokens_and_limits_are_gearfalls(tokens_at_once: int):
    rig = Rig(AsyncLLM(tokens_at_once=tokens_at_once))
    whole = answer(PROMPT, 61)
    stop = whole[4]
    rig.jobs.handle(submit("stop", sampling={"stop_token_ids": (stop,)}, tokens=20))
    rig.jobs.handle(
        submit("deaf", sampling={"stop_token_ids": (stop,), "ignore_eos": True}, tokens=20)
    )
    rig.jobs.handle(submit("context", tokens=1000))
    ends = {run.job_id: run.finish for run in await rig.ended(3)}
    assert rig.tokens("stop") == whole[: whole.index(stop) + 1]
    assert rig.tokens("deaf") == whole[:20]
    assert rig.tokens("context") == whole
    assert ends == {
        "stop": FinishReason.STOP, "deaf": FinishReason.LENGTH, "context": FinishReason.LENGTH,
    }  # fmt: skip
    await rig.jobs.stop()


async def test_a_probe_is_answered_by_an_engine_that_has_nothing_to_say(rig: Rig):
    rig.jobs.handle(ProbeEngine())
    await rig.until(lambda: rig.steps)
    (step,) = rig.steps
    assert (step.runs, step.reports, step.running_jobs) == ((), (), 0)


async def test_a_probe_waits_for_the_requests_that_run(stepped: Rig):
    stepped.jobs.handle(submit("a"))
    stepped.jobs.handle(PinJob(JobId("nobody"), EPOCH))
    await stepped.until(lambda: stepped.reports(JobPhase.GONE))
    stepped.jobs.handle(ProbeEngine())
    stepped.llm.step()
    await stepped.until(lambda: stepped.runs)
    assert [len(step.runs) for step in stepped.steps] == [0, 1], "an output is the answer"
    stepped.jobs.handle(ProbeEngine())
    stepped.jobs.handle(CancelJob(JobId("a"), EPOCH))
    await stepped.until(lambda: len(stepped.steps) == 3)
    assert stepped.steps[2].running_jobs == 0


async def test_a_cancelled_job_is_aborted_and_says_nothing(stepped: Rig):
    stepped.jobs.handle(submit("a"))
    stepped.llm.step(2)
    await stepped.until(lambda: len(stepped.runs) == 2)
    stepped.jobs.handle(CancelJob(JobId("a"), EPOCH))
    stepped.jobs.handle(submit("b"))
    stepped.llm.step(99)
    await stepped.ended()
    assert stepped.tokens("a") == answer(PROMPT, 2)
    assert [each.split("/")[0] for each in stepped.llm.aborted] == ["a"]


async def test_a_frozen_job_goes_on_from_its_tokens(stepped: Rig):
    stepped.jobs.handle(submit("a"))
    stepped.jobs.handle(PinJob(JobId("a"), EPOCH))
    stepped.llm.step(3)
    await stepped.until(lambda: len(stepped.runs) == 3)
    stepped.jobs.handle(FreezeJob(JobId("a"), EPOCH))
    await stepped.until(lambda: stepped.reports(JobPhase.FROZEN))
    (report,) = stepped.reports(JobPhase.FROZEN)
    assert (report.next_index, report.block_table) == (3, ())
    stepped.llm.step(99)
    stepped.jobs.handle(ThawJob(JobId("a"), EPOCH))
    stepped.jobs.handle(UnpinJob(JobId("a"), EPOCH))
    await stepped.ended()
    assert stepped.tokens("a") == answer(PROMPT, 6)
    assert len(stepped.llm.requests) == 2


async def test_a_held_job_is_computed_fed_and_released(stepped: Rig):
    whole = answer(PROMPT, 6)
    stepped.jobs.handle(HoldJob(submit("a", generated=whole[:1])))
    stepped.llm.step()
    await stepped.until(lambda: any(r.computed_tokens for r in stepped.reports(JobPhase.HELD)))
    assert stepped.reports(JobPhase.HELD)[-1].computed_tokens == len(PROMPT) + 1
    stepped.jobs.handle(FeedJob(JobId("a"), EPOCH, 0, tuple(whole[:2])))
    stepped.jobs.handle(FeedJob(JobId("a"), EPOCH, 2, tuple(whole[2:3])))
    stepped.llm.step()
    await stepped.until(
        lambda: stepped.reports(JobPhase.HELD)[-1].computed_tokens == len(PROMPT) + 3
    )
    stepped.jobs.handle(ReleaseJob(JobId("a"), EPOCH))
    await stepped.until(lambda: stepped.reports(JobPhase.RUNNING))
    stepped.llm.step(99)
    (end,) = await stepped.ended()
    assert stepped.tokens("a") == whole[3:]
    assert (end.finish, stepped.reports(JobPhase.RUNNING)[0].next_index) == (
        FinishReason.LENGTH, 3,
    )  # fmt: skip


class EndsWithoutToken(AsyncLLM):
    """As vLLM does with the finish reasons abort and error."""

    async def generate(self, prompt: Any, sampling_params: Any, request_id: str, **_: Any) -> Any:
        self.requests.append((prompt, sampling_params, request_id, 0))
        await asyncio.sleep(0)
        yield RequestOutput(request_id, [CompletionOutput(0, "", [], None, [], "error")], True)


@pytest.mark.parametrize(
    "llm", [EndsWithoutToken(), AsyncLLM(error=ValueError("too odd"))], ids=["ended", "failed"]
)
async def test_a_held_job_that_vllm_does_not_compute_waits_for_nothing(llm: AsyncLLM):
    rig = Rig(llm)
    rig.jobs.handle(HoldJob(submit("a", generated=(1, 2))))
    await rig.until(lambda: any(r.computed_tokens for r in rig.reports(JobPhase.HELD)))
    assert rig.reports(JobPhase.HELD)[-1].computed_tokens == len(PROMPT) + 2
    assert len(llm.requests) == 1
    await rig.jobs.stop()


async def test_a_released_job_that_is_whole_ends(rig: Rig):
    whole = answer(PROMPT, 6)
    rig.jobs.handle(HoldJob(submit("a", generated=whole)))
    rig.jobs.handle(ReleaseJob(JobId("a"), EPOCH))
    (end,) = await rig.ended()
    assert (end.index, end.finish, end.token_ids) == (6, FinishReason.LENGTH, ())


async def test_what_can_not_be_held_is_refused(rig: Rig):
    rig.jobs.handle(HoldJob(submit("kv"), by_kv=True))
    rig.jobs.handle(HoldJob(submit("gap")))
    rig.jobs.handle(FeedJob(JobId("gap"), EPOCH, 2, (1,)))
    rig.jobs.handle(HoldJob(submit("long", generated=[1] * 62)))
    rig.jobs.handle(FreezeJob(JobId("nobody"), EPOCH))
    await rig.until(lambda: rig.reports(JobPhase.GONE))
    refused = {report.job_id: report.error for report in rig.reports(JobPhase.REFUSED)}
    assert "keys and values" in refused[JobId("kv")]
    assert "missing" in refused[JobId("gap")]
    assert "more than 64" in refused[JobId("long")]


async def test_a_deadline_ends_a_job(stepped: Rig):
    stepped.jobs.handle(submit("late", deadline_unix_s=999.0))
    stepped.jobs.handle(submit("early", deadline_unix_s=2000.0))
    (end,) = await stepped.ended()
    assert (end.job_id, end.finish) == ("late", FinishReason.DEADLINE)


async def test_bad_jobs_and_adapters_concern_nobody_else(rig: Rig):
    attach = AttachAdapter(adapter="d1", name="tuned", manifest_json=b"", config_json=b"")
    rig.jobs.handle(attach)
    rig.jobs.handle(submit("adapted", adapter="d1"))
    rig.jobs.handle(submit("strange", generated=(VOCABULARY,)))
    rig.jobs.handle(submit("good"))
    ends = {run.job_id: run.error for run in await rig.ended(3)}
    assert "takes no adapter" in ends[JobId("adapted")]
    assert "vocabulary" in ends[JobId("strange")]
    assert ends[JobId("good")] == ""
    assert [report.adapter for step in rig.steps for report in step.adapters] == ["d1"]


async def test_a_request_that_vllm_fails_ends_alone(rig: Rig):
    rig.llm.error = ValueError("too odd")
    rig.jobs.handle(submit("a"))
    (end,) = await rig.ended()
    assert (end.finish, end.error) == (FinishReason.ERROR, "vLLM: ValueError: too odd")
    assert not rig.jobs.died.is_set()


async def test_an_answer_that_vllm_cuts_short_is_an_error():
    class Short(AsyncLLM):
        async def generate(self, *arguments: Any, **named: Any) -> Any:
            async for output in super().generate(*arguments, **named):
                yield output
                return

    rig = Rig(Short())
    rig.jobs.handle(submit("a"))
    (end,) = await rig.ended()
    assert (end.finish, end.index) == (FinishReason.ERROR, 1)
    assert "before it was whole" in end.error
