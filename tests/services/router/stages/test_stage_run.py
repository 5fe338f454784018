"""What one stage's run says of its answer besides the text."""

from dataclasses import replace
from typing import Any

from gearfall.core.generation.job import FinishReason, TokenRun
from gearfall.core.ids import Epoch, JobId, ModelName, WorkerId
from gearfall.core.records import Stage
from services.router.generation import GenerationRequest, TextPrompt
from services.router.stages.stage_plan import StageReady
from services.router.stages.stage_run import StageRun
from services.router.stages.stage_watch import Yardstick
from services.router.text.tokenizing import ModelTokenizer
from tests.services.router.char_models import char_tokenizer_files, ids_of, model_record

JOB = JobId("job")


class Copied(tuple[int, ...]):
    """Token ids that count how many of them were copied into another tuple."""

    tokens = 0

    def __getitem__(self, place: Any) -> Any:
        taken = super().__getitem__(place)
        if isinstance(taken, int):
            return taken
        Copied.tokens += len(taken)
        return Copied(taken)


def stage_run(*stops: str) -> StageRun:
    def ignore(*_: Any, **__: Any) -> None: ...

    name, prompt = ModelName("large"), TextPrompt("say:")
    tokenizer = ModelTokenizer(name, char_tokenizer_files())
    return StageRun(
        StageReady(Stage(name), model_record(name), tokenizer, tokenizer.encode(prompt), 50),
        GenerationRequest(name, (prompt,), stop=stops),
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


async def test_a_run_of_many_tokens_is_cut_once_where_a_stop_string_may_end_it():
    run, text = stage_run("z"), "168" * 40
    run.on_bound(WorkerId("worker"), Epoch(1), 0.0)
    whole = tokens(0, text + "z" + text, finish=FinishReason.LENGTH)
    Copied.tokens = 0
    run.on_run(replace(whole, token_ids=Copied(whole.token_ids)))
    assert run.token_ids == list(ids_of(text + "z"))
    assert run.ended.done()
    assert 0 < Copied.tokens <= 3 * len(run.token_ids)
