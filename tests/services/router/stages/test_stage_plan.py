"""Plans of stages: a request's prompts are read as one."""

import threading

import pytest

from gearfall.core.ids import ModelName
from gearfall.core.records import ModelRecord, Stage
from services.router.generation import GenerationRequest, TextPrompt
from services.router.stages.stage_plan import plan_stages
from services.router.text.tokenizing import ModelTokenizer, TokenizerCache
from tests.services.router.char_models import Files, WatchedTokenizer, model_record

SMALL = ModelName("small")


class Tokenizers(TokenizerCache):
    """Has one tokenizer for all models."""

    def __init__(self) -> None:
        super().__init__(Files())
        self.tokenizer = WatchedTokenizer()

    async def get(self, model: ModelRecord) -> ModelTokenizer:
        return self.tokenizer


@pytest.mark.parametrize(("count", "in_loop"), [(1, True), (64, False)])
async def test_many_prompts_are_read_beside_the_loop_as_one_long_one_is(count, in_loop):
    request = GenerationRequest("small", (TextPrompt("x" * 100),) * count)
    models, tokenizers = {SMALL: model_record("small")}, Tokenizers()
    for prompt in request.prompts:
        await plan_stages(request, prompt, (Stage(SMALL),), models, tokenizers)
    assert (threading.get_ident() in tokenizers.tokenizer.threads) == in_loop
