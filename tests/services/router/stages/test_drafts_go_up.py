"""A rejected answer goes up with the request; what comes of it is what came without."""

from dataclasses import dataclass, replace

import pytest

from gearfall.core.certainty.draft_worth import MIN_DRAFTS
from gearfall.core.generation.job import FinishReason, Job, TokenRun
from gearfall.core.ids import DeploymentName, ModelName
from gearfall.core.model_pace import NEWEST, Timing
from tests.services.router.char_models import EOS_ID, ids_of
from tests.services.router.rig import Answer, Rig, running_rig


@dataclass
class VerifyingAnswer(Answer):
    """Says at once what of the job's draft it would have said, as an engine does."""

    def run_at(self, job: Job, index: int) -> TokenRun:
        run = super().run_at(job, index)
        answer, draft = (*ids_of(self.text), EOS_ID), job.draft_token_ids
        if draft[:index] != answer[:index]:
            return run
        guess = tuple(each for each in draft[index:] if each != EOS_ID)
        for place, token in enumerate(guess):
            if run.finish is not None or token != answer[index + place]:
                break
            run = _joined(run, super().run_at(job, index + place + 1))
        return replace(run, draft_tokens=len(guess), accepted_draft_tokens=len(run.token_ids) - 1)


def _joined(first: TokenRun, second: TokenRun) -> TokenRun:
    return replace(
        first,
        token_ids=first.token_ids + second.token_ids,
        logprobs=first.logprobs + second.logprobs,
        margins=first.margins + second.margins,
        alternatives=first.alternatives + second.alternatives,
        finish=second.finish,
    )


async def cascade(rig: Rig, *models: str) -> None:
    for place, model in enumerate(models):
        await rig.add_model(model, parameters=10 ** (place + 1))
    bounds = [*[0.5] * (len(models) - 1), None]
    await rig.deploy("both", *zip(models, bounds, strict=True))


def unsure(text: str, tokens: int | None = None) -> Answer:
    """An answer that is certain enough up to its last token, and below 0.5 with it."""
    return Answer(text, logprob=-0.71 / (tokens or len(text) + 1))


async def test_the_rejected_answer_is_the_next_stages_draft():
    async with running_rig() as rig:
        await cascade(rig, "small", "large")
        worker = rig.worker(small=unsure("16x"), large=VerifyingAnswer("168"))
        outcome = await rig.ask("both", "hi")
        assert outcome.text() == "168"
        first, second = worker.jobs
        assert (first.draft_token_ids, second.draft_token_ids) == ((), (*ids_of("16x"), EOS_ID))
        below, above = outcome.ends[0].stages
        assert (below.draft_tokens, below.accepted_draft_tokens) == (0, 0)
        assert (above.draft_tokens, above.accepted_draft_tokens) == (3, 2)
        assert above.cost_flops == 2 * 100 * (3 + 4 + 1), "the wrong token was computed too"
        text = rig.router.service.metrics.render(0, {}, {}).decode()
        for kind, count in (("accepted", 2), ("rejected", 1)):
            labels = f'model="both",outcome="{kind}",stage="large"'
            assert f"gearfall_draft_tokens_total{{{labels}}} {count}.0" in text


async def test_a_hopeless_draft_goes_on_once_its_tokens_are_known_to_be_worth_it():
    """The larger model is slow and agrees: that is seen from the drafts that were stopped."""
    async with running_rig() as rig:
        await cascade(rig, "small", "large")
        for name, step_s in (("small", 0.001), ("large", 1.0)):
            key = DeploymentName("both"), ModelName(name)
            for _ in range(NEWEST):
                timing = Timing(2, step_s, further_tokens=9, further_s=9 * step_s)
                rig.router.service.prospects.learn(key, timing, 10)
        small = Answer("wrong", logprobs=(-0.1, -9.0))
        rig.worker(small=small, large=VerifyingAnswer("wrong again"))
        below = [(await rig.ask("both")).ends[0].stages[0] for _ in range(MIN_DRAFTS + 1)]
        assert [(each.stopped_early, each.completion_tokens) for each in below] == [
            *[(True, 2)] * MIN_DRAFTS,
            (False, 6),
        ]


@pytest.mark.parametrize(
    ("fields", "tokens"),
    [
        ({}, 17),
        ({"stop": ("or",)}, 9),
        ({"stop": (" wo", "rl"), "logprobs": True, "top_logprobs": 1}, 8),
        ({"logprobs": True, "top_logprobs": 2}, 17),
        ({"max_tokens": 7}, 7),
        ({"n": 2}, 17),
    ],
)
async def test_tokens_that_come_at_once_are_the_answer_that_came_one_by_one(fields, tokens):
    found = []
    for answer in (Answer("hello world"), VerifyingAnswer("hello world")):
        async with running_rig() as rig:
            await cascade(rig, "small", "large")
            rig.worker(small=unsure("hello world, all", tokens), large=answer)
            outcome = await rig.ask("both", "hi", seed=3, **fields)
            found.append(
                [
                    (
                        outcome.text(end.choice),
                        [each for delta in outcome.deltas(end.choice) for each in delta.logprobs],
                        end.finish,
                        [(each.completion_tokens, each.certainty) for each in end.stages],
                    )
                    for end in outcome.ends
                ]
            )
            assert sum(end.stages[-1].accepted_draft_tokens for end in outcome.ends) > 0 or (
                type(answer) is Answer
            )
    assert found[0] == found[1]


async def test_an_answer_below_a_stage_that_failed_goes_on_up():
    async with running_rig() as rig:
        await cascade(rig, "small", "middle", "large")
        failing = Answer("", finish=FinishReason.ERROR, error="no")
        worker = rig.worker(small=unsure("168"), middle=failing, large=VerifyingAnswer("168"))
        outcome = await rig.ask("both", "hi")
        assert [each.accepted_draft_tokens for each in outcome.ends[0].stages] == [0, 0, 3]
        assert [len(job.draft_token_ids) for job in worker.jobs] == [0, 4, 4]


@pytest.mark.parametrize("index", [0, 2])
async def test_a_job_that_lost_its_owner_keeps_its_draft(index):
    async with running_rig() as rig:
        await cascade(rig, "small", "large")
        small = unsure("16x")
        worker = rig.worker(small=small)
        large = rig.worker("worker-b", large=Answer("168"))
        large.die_at = {index: 1}
        outcome = await rig.ask("both", "hi")
        assert outcome.text() == "168"
        first, second = large.jobs
        assert first.draft_token_ids == second.draft_token_ids == (*ids_of("16x"), EOS_ID)
        assert second.generated_token_ids == ids_of("168")[:index]
        assert len(worker.jobs) == 1
