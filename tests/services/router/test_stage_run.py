"""What one stage's run says of its answer besides the text."""

from typing import Any

from gearfall.core.ids import Epoch, JobId, ModelName, WorkerId
from gearfall.core.job import FinishReason, TokenRun
from gearfall.core.records import Stage
from services.router.generation import GenerationRequest, TextPrompt
from services.router.stage_plan import StageReady
from services.router.stage_run import StageRun
from services.router.stage_watch import Yardstick
from services.router.tokenizing import ModelTokenizer
from tests.services.router.char_models import char_tokenizer_files, ids_of, model_record

JOB = JobId("job")


def stage_run() -> StageRun:
    def ignore(*_: Any, **__: Any) -> None: ...

    name, prompt = ModelName("large"), TextPrompt("say:")
    tokenizer = ModelTokenizer(name, char_tokenizer_files())
    return StageRun(
        StageReady(Stage(name), model_record(name), tokenizer, tokenizer.encode(prompt), 50),
        GenerationRequest(name, (prompt,)),
        JOB,
        yardstick=Yardstick("mean_token_probability"),
        watch=None,
        forecast=None,
        on_falling=ignore,
        on_piece=ignore,
        on_beginning=ignore,
        close_job=ignore,
        note=ignore,
    )


def tokens(index: int, text: str, **facts: Any) -> TokenRun:
    ids, zeros = ids_of(text), (0.0,) * len(text)
    return TokenRun(JOB, Epoch(1), index, ids, zeros, zeros, **facts)


async def test_the_timing_of_an_answer_says_which_tokens_its_draft_brought():
    run = stage_run()
    run.on_bound(WorkerId("worker"), Epoch(1), 0.0)
    run.on_run(tokens(0, "168", draft_tokens=4, accepted_draft_tokens=2))
    run.on_run(tokens(3, "x"))
    run.on_run(tokens(4, "y", finish=FinishReason.LENGTH))
    timing = run.timing()
    assert timing is not None
    assert (timing.further_tokens, timing.right_draft_tokens) == (4, 2)
