"""What a generation gives a caller: events while it runs, an answer when it is done."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from gearfall.core.certainty.escalation import Degraded, parse_degraded
from gearfall.core.errors import Internal
from gearfall.core.generation.job import FinishReason
from gearfall.core.generation.usage import StageReport, Usage
from gearfall.infra.net.convert import finish_from_pb
from gearfall.pb import router_pb2 as pb


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One generated token with its log-probability and, if asked for, its alternatives."""

    token_id: int
    token: str
    logprob: float
    top: tuple["TokenLogprob", ...] = ()


@dataclass(frozen=True, slots=True)
class Started:
    """The request was admitted."""

    request_id: str
    seed: int
    deployment: str
    cache: str = ""
    """Of deployments that keep answers: hit, miss, or joined while another request computes it."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """A choice waits for a cold or busy model, probably for `expected_s` more seconds."""

    choice: int
    model: str
    expected_s: float


@dataclass(frozen=True, slots=True)
class TextDelta:
    """Text of one choice; only a Replaced takes it back."""

    choice: int
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Replaced:
    """Every TextDelta of the choice so far is void; those of another stage follow.

    Only with stream mode `draft`.
    """

    choice: int
    model: str
    """Whose text is void."""
    next_model: str
    """Whose text follows."""
    characters: int
    """That are void."""
    logprobs: int
    """Entries that are void."""


@dataclass(frozen=True, slots=True)
class Finished:
    """A choice is complete."""

    choice: int
    finish: FinishReason
    model: str
    stages: tuple[StageReport, ...]
    usage: Usage
    degraded: Degraded | None = None
    """Why a less certain answer was given than the cascade would have given."""


Event = Started | Waiting | TextDelta | Replaced | Finished


@dataclass(frozen=True, slots=True)
class Choice:
    """One of the `n` answers."""

    text: str
    finish: FinishReason
    model: str
    stages: tuple[StageReport, ...]
    usage: Usage
    logprobs: tuple[TokenLogprob, ...] = ()
    degraded: Degraded | None = None
    """Why a less certain answer was given than the cascade would have given."""


@dataclass(frozen=True, slots=True)
class Answer:
    """All choices of a request. `text` and `model` are the first choice's."""

    request_id: str
    seed: int
    choices: tuple[Choice, ...] = field(default=())

    @property
    def text(self) -> str:
        """Text of the first choice."""
        return self.choices[0].text

    @property
    def model(self) -> str:
        """Model that gave the first choice."""
        return self.choices[0].model


def event_from_pb(message: pb.GenerateEvent) -> Event:
    """Return the typed event; raise Internal for one this client does not know."""
    match message.WhichOneof("event"):
        case "start":
            start = message.start
            return Started(start.request_id, start.seed, start.deployment, start.cache)
        case "wait":
            return Waiting(message.wait.choice, message.wait.model, message.wait.expected_s)
        case "delta":
            delta = message.delta
            return TextDelta(
                delta.choice, delta.text, tuple(_logprob_from_pb(item) for item in delta.logprobs)
            )
        case "replace":
            it = message.replace
            return Replaced(it.choice, it.model, it.next_model, it.characters, it.logprobs)
        case "end":
            return _finished_from_pb(message.end)
        case unknown:
            raise Internal(f"unknown event {unknown!r} from the router")


def _logprob_from_pb(message: pb.TokenLogprob) -> TokenLogprob:
    top = tuple(_logprob_from_pb(item) for item in message.top)
    return TokenLogprob(message.token_id, message.token, message.logprob, top)


def _finished_from_pb(message: pb.GenerateEnd) -> Finished:
    finish = finish_from_pb(message.finish)
    if finish is None:
        raise Internal("the router ended a choice without a reason")
    usage = message.usage
    return Finished(
        message.choice,
        finish,
        message.model,
        tuple(_stage_from_pb(stage) for stage in message.stages),
        Usage(
            usage.prompt_tokens,
            usage.completion_tokens,
            usage.total_prompt_tokens,
            usage.total_completion_tokens,
            usage.cost_flops,
            usage.cached_tokens,
            usage.device_s,
            usage.start_s,
        ),
        parse_degraded(message.degraded),
    )


def _stage_from_pb(message: pb.StageReport) -> StageReport:
    return StageReport(
        model=message.model,
        measure=message.certainty.measure,
        certainty=message.certainty.value if message.HasField("certainty") else None,
        threshold=message.threshold if message.HasField("threshold") else None,
        prompt_tokens=message.prompt_tokens,
        completion_tokens=message.completion_tokens,
        cost_flops=message.cost_flops,
        duration_s=message.duration_s,
        queued_s=message.queued_s,
        epochs=message.epochs,
        is_accepted=message.accepted,
        error=message.error,
        cached_tokens=message.cached_tokens,
        token_logprobs=tuple(message.token_logprobs),
        token_margins=tuple(message.token_margins),
        stopped_early=message.stopped_early,
        spared_tokens=message.spared_tokens,
        draft_tokens=message.draft_tokens,
        accepted_draft_tokens=message.accepted_draft_tokens,
        device_s=message.device_s,
        start_s=message.start_s,
        samples=message.samples,
        agreeing=message.agreeing,
        other_prompt_tokens=message.other_prompt_tokens,
        other_completion_tokens=message.other_completion_tokens,
    )


def answer_from_events(events: Iterable[Event]) -> Answer:
    """Fold a finished stream of events into an Answer; raise Internal when a choice is missing."""
    started: Started | None = None
    texts: dict[int, list[TextDelta]] = {}
    ends: dict[int, Finished] = {}
    for event in events:
        match event:
            case Started():
                started = event
            case TextDelta():
                texts.setdefault(event.choice, []).append(event)
            case Replaced():
                texts.pop(event.choice, None)
            case Finished():
                ends[event.choice] = event
    if started is None or not ends or sorted(ends) != list(range(len(ends))):
        raise Internal("the router's stream ended before its last event")
    choices = tuple(_choice(texts.get(index, []), ends[index]) for index in sorted(ends))
    return Answer(started.request_id, started.seed, choices)


def _choice(deltas: list[TextDelta], end: Finished) -> Choice:
    return Choice(
        text="".join(delta.text for delta in deltas),
        finish=end.finish,
        model=end.model,
        stages=end.stages,
        usage=end.usage,
        logprobs=tuple(item for delta in deltas for item in delta.logprobs),
        degraded=end.degraded,
    )
