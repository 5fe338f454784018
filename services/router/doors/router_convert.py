"""Converters between the router's values and `gearfall.v1` router messages."""

from gearfall.core.errors import InvalidRequest
from gearfall.core.generation.streaming import parse_stream_mode
from gearfall.core.generation.usage import StageReport, Usage
from gearfall.core.records import DecisionRecord
from gearfall.infra.net.convert import FINISH_TO_PB, priority_from_pb
from gearfall.pb import common_pb2, scheduler_pb2
from gearfall.pb import router_pb2 as pb
from services.router.generation import (
    ChatMessage,
    ChatPrompt,
    ChoiceEnd,
    Delta,
    GenerationEvent,
    GenerationRequest,
    Prompt,
    Replace,
    TextPrompt,
    TokenPrompt,
    TokenText,
    Wait,
    check_tenant,
)
from services.router.request_log import RequestEvent
from services.router.running_request import RunningRequest


def request_from_pb(message: pb.GenerateRequest, *, is_whole: bool = False) -> GenerationRequest:
    """Return the checked request; raise InvalidRequest that names the field.

    `is_whole`: the client takes the answer whole.
    """
    if not message.model:
        raise InvalidRequest("model is missing", param="model")
    return GenerationRequest(
        model=message.model,
        prompts=(_prompt_from_pb(message),),
        max_tokens=message.max_tokens if message.HasField("max_tokens") else None,
        temperature=message.temperature if message.HasField("temperature") else 1.0,
        top_p=message.top_p if message.HasField("top_p") else 1.0,
        top_k=message.top_k,
        seed=message.seed if message.HasField("seed") else None,
        stop=tuple(message.stop),
        n=message.n or 1,
        logprobs=message.logprobs or message.top_logprobs > 0,
        top_logprobs=message.top_logprobs,
        timeout_s=message.timeout_s,
        priority=priority_from_pb(message.priority),
        tenant=check_tenant(message.tenant),
        ignore_eos=message.ignore_eos,
        request_id=message.request_id,
        is_whole=is_whole,
        stream_mode=parse_stream_mode(message.stream_mode) if message.stream_mode else None,
        hold_tokens=message.hold_tokens if message.HasField("hold_tokens") else None,
    )


def _prompt_from_pb(message: pb.GenerateRequest) -> Prompt:
    match message.WhichOneof("prompt"):
        case "text":
            return TextPrompt(message.text)
        case "chat":
            messages = (ChatMessage(each.role, each.content) for each in message.chat.messages)
            return ChatPrompt(tuple(messages))
        case "tokens":
            return TokenPrompt(tuple(message.tokens.token_ids))
        case _:
            raise InvalidRequest("prompt is missing", param="prompt")


def start_to_pb(running: RunningRequest) -> pb.GenerateEvent:
    """Return the message for what is known of a request when it begins."""
    start = pb.GenerateStart(
        request_id=running.request_id,
        seed=running.seed,
        deployment=running.deployment,
        gear_plan_version=running.gear.version if running.gear else 0,
        gear=running.gear.label.partition("/")[2] if running.gear else "",
        cache=running.cache,
    )
    return pb.GenerateEvent(start=start)


def event_to_pb(event: GenerationEvent) -> pb.GenerateEvent:
    """Return the message for one event of a running request."""
    if isinstance(event, Delta):
        delta = pb.GenerateDelta(
            choice=event.choice,
            text=event.text,
            logprobs=[_token_to_pb(each) for each in event.logprobs],
        )
        return pb.GenerateEvent(delta=delta)
    if isinstance(event, Wait):
        wait = pb.GenerateWait(choice=event.choice, model=event.model, expected_s=event.expected_s)
        return pb.GenerateEvent(wait=wait)
    if isinstance(event, Replace):
        return pb.GenerateEvent(replace=_replace_to_pb(event))
    return pb.GenerateEvent(end=_end_to_pb(event))


def explanation_to_pb(request_id: str, event: RequestEvent) -> scheduler_pb2.Explanation:
    """Return the message for one event of the request log."""
    return scheduler_pb2.Explanation(
        at_unix_s=event.at_unix_s,
        subject=request_id,
        decision=event.decision,
        reason=event.reason,
        predicted_s=event.predicted_s,
        measured_s=event.measured_s,
    )


def promise_to_pb(
    deployment: str, at_unix_s: float, decision: str, reason: str
) -> scheduler_pb2.Explanation:
    """Return the message for what is known about a plan's promise."""
    return scheduler_pb2.Explanation(
        at_unix_s=at_unix_s, subject=deployment, decision=decision, reason=reason
    )


def decision_to_pb(decision: DecisionRecord) -> scheduler_pb2.Explanation:
    """Return the message for what the scheduler decided about a model that a request waited for."""
    return scheduler_pb2.Explanation(
        at_unix_s=decision.at_unix_s,
        subject=f"model {decision.model}",
        decision=decision.decision,
        reason=decision.reason,
        rejected=[
            scheduler_pb2.Alternative(choice=choice, reason=reason)
            for choice, reason in decision.rejected
        ],
        predicted_s=decision.predicted_start_s,
    )


def _replace_to_pb(replace: Replace) -> pb.GenerateReplace:
    return pb.GenerateReplace(
        choice=replace.choice,
        model=replace.model,
        next_model=replace.next_model,
        characters=replace.characters,
        logprobs=replace.logprobs,
    )


def _end_to_pb(end: ChoiceEnd) -> pb.GenerateEnd:
    return pb.GenerateEnd(
        choice=end.choice,
        finish=FINISH_TO_PB[end.finish],
        model=end.model,
        stages=[_report_to_pb(each) for each in end.stages],
        usage=_usage_to_pb(end.usage),
        degraded=end.degraded.value if end.degraded else "",
    )


def _report_to_pb(report: StageReport) -> pb.StageReport:
    certainty = None
    if report.certainty is not None:
        certainty = common_pb2.Certainty(measure=report.measure, value=report.certainty)
    return pb.StageReport(
        model=report.model,
        certainty=certainty,
        threshold=report.threshold,
        prompt_tokens=report.prompt_tokens,
        completion_tokens=report.completion_tokens,
        cost_flops=report.cost_flops,
        duration_s=report.duration_s,
        queued_s=report.queued_s,
        epochs=report.epochs,
        accepted=report.is_accepted,
        error=report.error,
        cached_tokens=report.cached_tokens,
        token_logprobs=report.token_logprobs,
        token_margins=report.token_margins,
        stopped_early=report.stopped_early,
        spared_tokens=report.spared_tokens,
        draft_tokens=report.draft_tokens,
        accepted_draft_tokens=report.accepted_draft_tokens,
        device_s=report.device_s,
        start_s=report.start_s,
        samples=report.samples,
        agreeing=report.agreeing,
        other_prompt_tokens=report.other_prompt_tokens,
        other_completion_tokens=report.other_completion_tokens,
    )


def _usage_to_pb(usage: Usage) -> pb.Usage:
    return pb.Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        total_prompt_tokens=usage.total_prompt_tokens,
        total_completion_tokens=usage.total_completion_tokens,
        cost_flops=usage.cost_flops,
        cached_tokens=usage.cached_tokens,
        device_s=usage.device_s,
        start_s=usage.start_s,
    )


def _token_to_pb(token: TokenText) -> pb.TokenLogprob:
    return pb.TokenLogprob(
        token_id=token.token_id,
        token=token.token,
        logprob=token.logprob,
        top=[_token_to_pb(each) for each in token.top],
    )
