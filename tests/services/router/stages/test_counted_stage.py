"""A stage that asks several times and counts the answers that are the same."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from gearfall.core.certainty.escalation import AtDeadline, Degraded, EscalationPolicy
from gearfall.core.certainty.self_consistency import SelfConsistency
from gearfall.core.errors import InvalidRequest
from gearfall.core.generation.job import FinishReason, Job, TokenRun
from gearfall.core.generation.streaming import Streaming, StreamMode
from gearfall.core.ids import DeploymentName, JobId, ModelName, RequestId
from gearfall.core.model_pace import Timing
from gearfall.core.records import DeploymentRecord, Stage
from services.router.generation import GenerationRequest, Replace, TextPrompt
from services.router.stages.stage_jobs import sampling_of
from services.router.stages.stage_plan import StageReady
from services.router.text.tokenizing import ModelTokenizer
from tests.services.router.char_models import char_tokenizer_files, ids_of, model_record
from tests.services.router.rig import Answer, Outcome, Rig, probability, running_rig

SMALL, LARGE = ModelName("small"), ModelName("large")
BROKEN = Answer("", finish=FinishReason.ERROR, error="engine says no")


@dataclass
class Several(Answer):
    """Another answer to each time that a stage of a greedy request asks."""

    answers: tuple[Answer, ...] = ()
    jobs: list[JobId] = field(default_factory=list)
    """In the order in which the stage asked."""

    def run_at(self, job: Job, index: int) -> TokenRun:
        if job.job_id not in self.jobs:
            self.jobs.append(job.job_id)
        number = self.jobs.index(job.job_id)
        return self.answers[number % len(self.answers)].run_at(job, index)


def several(*texts: str, **facts: Any) -> Several:
    """The first text is the least probable, all are likely."""
    count = len(texts)
    answers = (Answer(text, logprob=-0.01 * (count - at), **facts) for at, text in enumerate(texts))
    return Several(answers=tuple(answers))


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    async with running_rig() as started:
        await started.add_model("small", parameters=10)
        await started.add_model("large", parameters=100)
        yield started


async def deploy(rig: Rig, threshold: float = 0.5, samples: int = 3, **fields: Any) -> None:
    stages = (Stage(SMALL, threshold, SelfConsistency(samples, 0.8)), Stage(LARGE))
    record = DeploymentRecord(DeploymentName("both"), stages, **fields)
    await rig.cluster.wait_seen(await rig.cluster.put_deployment(record))


async def ask(rig: Rig, **fields: Any) -> Outcome:
    return await rig.ask("both", temperature=0.0, **fields)


async def test_what_most_answers_say_is_given_and_the_rest_not_waited_for(rig: Rig):
    await deploy(rig)
    rig.worker(small=several("wrong", "right", "right"), large=Answer("never"))
    outcome = await ask(rig)
    assert outcome.text() == "right"
    (report,) = outcome.ends[0].stages
    assert (report.samples, report.agreeing, report.is_accepted) == (3, 2, True)
    assert report.measure == "self_consistency"
    # The last one is the most probable of the two: six tokens of -0.01.
    assert report.certainty == pytest.approx((1 + probability(-0.01, 6)) / 3, rel=1e-5)
    assert (report.completion_tokens, report.other_completion_tokens) == (6, 12)
    usage = outcome.ends[0].usage
    assert (usage.completion_tokens, usage.total_completion_tokens) == (6, 18)
    assert (usage.prompt_tokens, usage.total_prompt_tokens) == (3, 9)
    assert usage.cost_flops == 2 * 10 * 3 * (3 + 6)


async def test_two_equal_answers_decide_before_the_third(rig: Rig):
    await deploy(rig, threshold=0.4)
    rig.worker(small=several("same", "same", "never told"), large=Answer("never"))
    outcome = await ask(rig)
    assert outcome.text() == "same"
    (report,) = outcome.ends[0].stages
    assert (report.agreeing, report.samples) == (2, 3)
    assert report.other_completion_tokens < 5 + len("never told")
    await rig.until(lambda: not any(rig.queue_server.queues.values()))


async def test_answers_that_differ_go_up_with_the_most_probable_as_draft(rig: Rig):
    await deploy(rig)
    worker = rig.worker(small=several("one", "two", "six"), large=Answer("seven"))
    outcome = await ask(rig, request_id="r1")
    assert outcome.text() == "seven"
    first, second = outcome.ends[0].stages
    assert (first.agreeing, first.is_accepted, second.is_accepted) == (1, False, True)
    assert first.certainty is not None
    assert first.certainty < 1 / 3
    (large,) = (job for job in worker.jobs if job.model == LARGE)
    assert large.draft_token_ids[:3] == ids_of("six")
    log = rig.router.service.request_log.events(RequestId("r1"))
    assert [each.decision for each in log].count("escalated") == 1


async def test_three_answers_of_which_two_differ_need_not_be_waited_for(rig: Rig):
    await deploy(rig, threshold=0.9)
    rig.worker(small=several("one", "two", "never told"), large=Answer("right"))
    outcome = await ask(rig)
    assert outcome.text() == "right"
    assert outcome.ends[0].stages[0].other_completion_tokens < 4 + len("never told")


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 2, 0), (1, 0, 2)])
async def test_an_answer_that_can_not_go_up_is_the_one_that_most_of_all_say(rig: Rig, order):
    """Two that differ are hopeless, but the larger model takes longer than is left."""
    await deploy(rig, threshold=0.9)
    rig.router.service.prospects.learn((DeploymentName("both"), LARGE), Timing(3, 90.0, 0, 0.0), 1)
    likely, right = Answer("wrong", logprob=-0.001), Answer("right", logprob=-0.2)
    said = (likely, right, right)
    rig.worker(small=Several(answers=tuple(said[at] for at in order)), large=Answer("never"))
    outcome = await ask(rig, timeout_s=60)
    assert outcome.text() == "right"
    assert outcome.ends[0].degraded is Degraded.DEADLINE
    assert outcome.ends[0].stages[0].agreeing == 2


async def test_an_answer_that_failed_agrees_with_none(rig: Rig):
    await deploy(rig)
    fine = several("yes", "yes", "yes")
    rig.worker(
        small=replace(fine, answers=(fine.answers[0], BROKEN, fine.answers[2])),
        large=Answer("never"),
    )
    outcome = await ask(rig)
    assert outcome.text() == "yes"
    (report,) = outcome.ends[0].stages
    assert (report.agreeing, report.error) == (2, "")


async def test_without_an_answer_the_stage_failed(rig: Rig):
    await deploy(rig)
    rig.worker(small=Several(answers=(BROKEN,) * 3), large=Answer("right"))
    outcome = await ask(rig)
    assert outcome.text() == "right"
    report = outcome.ends[0].stages[0]
    assert "engine says no" in report.error
    assert (report.certainty, report.agreeing) == (None, 0)


async def test_log_probabilities_are_those_of_the_answer_that_is_shown(rig: Rig):
    await deploy(rig)
    rig.worker(small=several("no", "yes", "yes"), large=Answer("never"))
    outcome = await ask(rig, logprobs=True)
    (delta, *more) = outcome.deltas()
    shown = [each for piece in (delta, *more) for each in piece.logprobs]
    assert "".join(each.token for each in shown) == "yes"
    assert [each.logprob for each in shown] == pytest.approx([-0.01] * 3)
    assert len(outcome.ends[0].stages[0].token_logprobs) == 4


async def test_what_is_compared_later_has_the_certainty_of_all_answers(rig: Rig):
    """As the plan's thresholds are chosen by; two that are equal would be enough to give one."""
    await deploy(rig, threshold=0.4, shadow_share=1.0)
    rig.worker(small=several("same", "same", "same"), large=Answer("same"))
    outcome = await ask(rig)
    (report,) = outcome.ends[0].stages
    assert report.agreeing == 3
    assert report.certainty == pytest.approx((2 + probability(-0.01, 5)) / 3, rel=1e-5)


@pytest.mark.parametrize("at_deadline", AtDeadline)
async def test_what_is_certain_and_waits_for_the_rest_is_given_at_the_deadline(
    rig: Rig, at_deadline
):
    policy = EscalationPolicy(at_deadline=at_deadline)
    await deploy(rig, threshold=0.4, shadow_share=1.0, escalation=policy)
    worker = rig.worker(small=several("ab", "ab", "abcdefgh"), large=Answer("never"))
    worker.hold_at = 7
    outcome = await ask(rig, timeout_s=0.4)
    assert outcome.text() == "ab"
    assert outcome.ends[0].degraded is None
    assert outcome.ends[0].stages[0].agreeing == 2


async def test_a_draft_is_shown_when_it_is_decided_and_replaced(rig: Rig):
    await deploy(rig, streaming=Streaming(StreamMode.DRAFT))
    rig.worker(small=several("one", "two", "six"), large=Answer("seven"))
    outcome = await ask(rig)
    (replaced,) = (each for each in outcome.events if isinstance(each, Replace))
    assert replaced.characters == len("six")
    assert outcome.text() == "seven"


async def test_beginnings_of_answers_that_are_counted_are_refused(rig: Rig):
    await deploy(rig)
    with pytest.raises(InvalidRequest, match="whole answers are the same") as caught:
        await ask(rig, stream_mode=StreamMode.EARLY)
    assert caught.value.param == "stream_mode"


async def test_at_the_deadline_the_answers_that_there_are_decide(rig: Rig):
    """The other two hang; the larger model is known to take longer than is left."""
    await deploy(rig)
    key = DeploymentName("both"), LARGE
    rig.router.service.prospects.learn(key, Timing(3, 30.0, 0, 0.0), 1)
    worker = rig.worker(small=several("ab", "abcdefgh", "abcdefgh"), large=Answer("never"))
    worker.hold_at = 5
    outcome = await ask(rig, timeout_s=0.4)
    assert outcome.text() == "ab"
    assert outcome.ends[0].degraded is Degraded.DEADLINE
    assert outcome.ends[0].stages[0].agreeing == 1


async def test_a_client_that_leaves_ends_all_answers(rig: Rig):
    await deploy(rig)
    worker = rig.worker(small=several("abcd", "abcd", "abcd"), large=Answer("never"))
    worker.hold_at = 2
    request = GenerationRequest("both", (TextPrompt("hi"),), temperature=0.0)
    running = await rig.router.service.start(request)
    await asyncio.wait_for(worker.held.wait(), 10)
    running.cancel()
    await running.wait_stopped()
    await rig.until(lambda: not any(rig.queue_server.queues.values()))
    await rig.until(lambda: len(worker.stops) == 1)
    assert len(worker.jobs) == 1


async def test_device_time_of_all_answers_counts(rig: Rig):
    await deploy(rig)
    rig.worker(small=several("no", "yes", "yes", device_s=0.5), large=Answer("never"))
    outcome = await ask(rig)
    (report,) = outcome.ends[0].stages
    assert report.device_s == pytest.approx(0.5 * (3 + 4 + 4))


def ready(stage: Stage, text: str = "hi") -> StageReady:
    tokenizer = ModelTokenizer(stage.model, char_tokenizer_files())
    prompt = tokenizer.encode(TextPrompt(text))
    return StageReady(stage, model_record(stage.model), tokenizer, prompt, 9)


def test_the_first_answer_is_the_one_that_is_asked_for_and_the_others_are_drawn():
    plan = ready(Stage(SMALL, 0.5, SelfConsistency(3, 0.8)))
    request = GenerationRequest("both", (TextPrompt("hi"),), temperature=0.3, top_p=0.9, n=2)
    found = [
        sampling_of(plan, request, 7, choice, number) for choice in (0, 1) for number in (0, 1, 2)
    ]
    assert [each.temperature for each in found] == [0.3, 0.8, 0.8] * 2
    assert {each.top_p for each in found} == {0.9}
    assert len({each.seed for each in found}) == 6
    plain = ready(Stage(SMALL, 0.5))
    assert sampling_of(plain, request, 7, 1, 0) == found[3]


@pytest.mark.parametrize("seed", [None, 5])
def test_a_greedy_request_has_the_same_answers_whenever_it_comes(seed):
    plan = ready(Stage(SMALL, 0.5, SelfConsistency(3)))
    request = GenerationRequest("both", (TextPrompt("hi"),), temperature=0.0, seed=seed)
    drawn = [sampling_of(plan, request, seed or own, 0, 1) for own in (11, 12)]
    assert drawn[0] == drawn[1]
    another = ready(plan.stage, "ho")
    assert sampling_of(another, request, seed or 11, 0, 1).seed != drawn[0].seed
    other = replace(request, seed=6)
    assert sampling_of(plan, other, 6, 0, 1) != drawn[0]


async def test_a_kept_answer_is_that_of_the_same_draws(rig: Rig):
    """Unlike one greedy answer, drawn ones depend on `top_p` and the seed."""
    await deploy(rig, cache_bytes=1 << 20)
    worker = rig.worker(small=several("yes", "yes", "yes"), large=Answer("never"))
    for fields in ({}, {}, {"top_p": 0.5}, {"top_p": 0.5}, {"seed": 3}):
        await ask(rig, **fields)
    asked = {(job.sampling.top_p, job.sampling.seed) for job in worker.jobs if job.sampling.seed}
    firsts = [job for job in worker.jobs if job.sampling.is_greedy]
    assert len(firsts) == 3
    assert len(asked) > 3
