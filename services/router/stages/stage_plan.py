"""What each stage will be asked, worked out and checked before anything is queued."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gearfall.core.errors import GearfallError, InvalidRequest, NotFound, Unavailable
from gearfall.core.generation.sampling import SamplingParams
from gearfall.core.ids import ModelName
from gearfall.core.records import ModelRecord, Stage
from services.router.generation import ChatPrompt, GenerationRequest, Prompt, TokenPrompt
from services.router.text.tokenizing import ModelTokenizer, TokenizerCache, encode_prompt

DEFAULT_MAX_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class StageReady:
    """One prompt for one stage."""

    stage: Stage
    record: ModelRecord
    tokenizer: ModelTokenizer
    prompt_token_ids: tuple[int, ...]
    max_tokens: int
    base: ModelRecord | None = None
    """Set where `record` is a LoRA adapter: the model that it runs on."""

    @property
    def host(self) -> ModelRecord:
        """The model whose replicas take the job."""
        return self.base or self.record

    @property
    def adapter(self) -> str:
        """Name of the adapter that the job runs with; empty for none."""
        return "" if self.base is None else self.record.name

    @property
    def parameters(self) -> int:
        """Parameters that compute a token."""
        return self.record.parameters + (0 if self.base is None else self.base.parameters)

    def sampling(self, request: GenerationRequest, seed: int) -> SamplingParams:
        """Return the job's sampling; `seed` is the choice's own."""
        return SamplingParams(
            max_tokens=self.max_tokens,
            temperature=request.temperature,
            top_p=request.top_p,
            top_k=request.top_k,
            seed=seed,
            stop_token_ids=self.record.eos_token_ids,
            top_logprobs=request.top_logprobs if request.logprobs else 0,
            ignore_eos=request.ignore_eos,
        )


@dataclass(frozen=True, slots=True)
class StageUnfit:
    """A stage that can't take the prompt; the one above it will."""

    stage: Stage
    error: GearfallError


StagePlan = StageReady | StageUnfit


async def plan_stages(
    request: GenerationRequest,
    prompt: Prompt,
    stages: Sequence[Stage],
    models: Mapping[ModelName, ModelRecord],
    tokenizers: TokenizerCache,
) -> tuple[StagePlan, ...]:
    """Return a plan for each stage. Raises what is wrong with the last: it must be able to answer.

    InvalidRequest with code context_length_exceeded when the prompt does not fit.
    """
    plans: list[StagePlan] = []
    contexts = [models[each.model].context_tokens for each in stages if each.model in models]
    ask = _Ask(request, prompt, tokenizers, max(contexts, default=0))
    for position, stage in enumerate(stages):
        try:
            plans.append(await _plan_stage(ask, stage, models))
        except GearfallError as error:
            if position == len(stages) - 1:
                raise
            plans.append(StageUnfit(stage, error))
    return tuple(plans)


def prompt_tokens(plans: Sequence[StagePlan]) -> int:
    """Tokens of a prompt on the first stage that takes it."""
    ready = (each for each in plans if isinstance(each, StageReady))
    return next((len(each.prompt_token_ids) for each in ready), 0)


async def _plan_stage(
    ask: "_Ask", stage: Stage, models: Mapping[ModelName, ModelRecord]
) -> StageReady:
    record = models.get(stage.model)
    if record is None:
        raise NotFound(f"model {stage.model!r} is not registered", param="model")
    base = base_of(record, models)
    tokenizer = await ask.tokenizers.get(base or record)
    ids = await ask.encode(tokenizer)
    _check_prompt(ask.prompt, ids, record)
    room = record.context_tokens - len(ids)
    return StageReady(
        stage=stage,
        record=record,
        tokenizer=tokenizer,
        prompt_token_ids=ids,
        max_tokens=min(ask.request.max_tokens or DEFAULT_MAX_TOKENS, room),
        base=base,
    )


def base_of(record: ModelRecord, models: Mapping[ModelName, ModelRecord]) -> ModelRecord | None:
    """Return the model that a LoRA adapter runs on, None for a model.

    Raises Unavailable when the base isn't registered, or has other bytes than the adapter's.
    """
    if not record.base:
        return None
    base = models.get(ModelName(record.base))
    if base is None or base.is_removing:
        raise Unavailable(
            f"{record.base}, which the adapter {record.name} needs, is not registered"
        )
    if base.digest != record.base_digest:
        raise Unavailable(f"the adapter {record.name} belongs to other bytes than {base.name} has")
    return base


class _Ask:
    """One prompt of one request, encoded once for all stages that tokenise alike."""

    def __init__(
        self,
        request: GenerationRequest,
        prompt: Prompt,
        tokenizers: TokenizerCache,
        most_tokens: int,
    ) -> None:
        """`most_tokens`: that any stage could take."""
        self.request = request
        self.prompt = prompt
        self.tokenizers = tokenizers
        self._most_tokens = most_tokens
        self._encoded: dict[bytes, tuple[int, ...]] = {}

    async def encode(self, tokenizer: ModelTokenizer) -> tuple[int, ...]:
        ids = self._encoded.get(tokenizer.content_key)
        if ids is None:
            ids = await encode_prompt(
                tokenizer, self.prompt, self._most_tokens, among=self.request.prompts
            )
            self._encoded[tokenizer.content_key] = ids
        return ids


def _check_prompt(prompt: Prompt, ids: tuple[int, ...], record: ModelRecord) -> None:
    param = "messages" if isinstance(prompt, ChatPrompt) else "prompt"
    if not ids:
        raise InvalidRequest("the prompt is empty", param=param)
    if len(ids) >= record.context_tokens:
        # Far above it they may be those of a beginning.
        least = "at least " if len(ids) > 2 * record.context_tokens else ""
        raise InvalidRequest(
            f"the prompt has {least}{len(ids)} tokens; {record.name} takes at most "
            f"{record.context_tokens} tokens, prompt and answer together",
            param=param,
            code="context_length_exceeded",
        )
    if isinstance(prompt, TokenPrompt) and max(ids) >= record.vocabulary_size:
        raise InvalidRequest(
            f"token id {max(ids)} is not in the vocabulary of {record.name}, which has "
            f"{record.vocabulary_size} tokens",
            param=param,
        )
