"""Converters between core values and the `gearfall.v1` messages that several services send."""

from gearfall.core.certainty.escalation import (
    AtDeadline,
    AtOverload,
    EscalationPolicy,
    WhileLoading,
    choice_of,
)
from gearfall.core.certainty.self_consistency import DEFAULT_TEMPERATURE, SelfConsistency
from gearfall.core.errors import InvalidRequest
from gearfall.core.generation.job import FinishReason, Job, Priority, TokenAlternative, TokenRun
from gearfall.core.generation.sampling import SamplingParams
from gearfall.core.generation.streaming import (
    DEFAULT_HOLD_TOKENS,
    Streaming,
    StreamMode,
    parse_stream_mode,
)
from gearfall.core.ids import DeploymentName, Epoch, JobId, ModelName, RequestId, RouterId
from gearfall.core.records import DeploymentRecord, ModelRecord, ReplicaRecord, ReplicaState, Stage
from gearfall.core.start_timeline import StartTimeline
from gearfall.core.tiers import Tier
from gearfall.pb import common_pb2 as pb

FINISH_TO_PB = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.CANCELLED: pb.FINISH_REASON_CANCELLED,
    FinishReason.ERROR: pb.FINISH_REASON_ERROR,
    FinishReason.DEADLINE: pb.FINISH_REASON_DEADLINE,
}
_FINISH_FROM_PB = {value: key for key, value in FINISH_TO_PB.items()}

_STATE_TO_PB = {
    ReplicaState.LOADING: pb.REPLICA_STATE_LOADING,
    ReplicaState.STARTING: pb.REPLICA_STATE_STARTING,
    ReplicaState.READY: pb.REPLICA_STATE_READY,
    ReplicaState.DRAINING: pb.REPLICA_STATE_DRAINING,
    ReplicaState.FAILED: pb.REPLICA_STATE_FAILED,
}

TIER_TO_PB = {
    Tier.REMOTE: pb.TIER_REMOTE,
    Tier.SSD: pb.TIER_SSD,
    Tier.DRAM: pb.TIER_DRAM,
    Tier.DEVICE: pb.TIER_DEVICE,
}
TIER_FROM_PB = {value: key for key, value in TIER_TO_PB.items()}


def finish_from_pb(value: "pb.FinishReason.ValueType") -> FinishReason | None:
    """Return the reason, or None for UNSPECIFIED; raise InvalidRequest for an unknown number."""
    if value == pb.FINISH_REASON_UNSPECIFIED:
        return None
    try:
        return _FINISH_FROM_PB[value]
    except KeyError:
        raise InvalidRequest(f"unknown finish reason {value}", param="finish") from None


def replica_state_to_pb(state: ReplicaState) -> "pb.ReplicaState.ValueType":
    """Return the wire value of `state`."""
    return _STATE_TO_PB[state]


def priority_to_pb(priority: Priority) -> "pb.Priority.ValueType":
    """Return the wire value of `priority`."""
    return pb.PRIORITY_BATCH if priority is Priority.BATCH else pb.PRIORITY_INTERACTIVE


def priority_from_pb(value: "pb.Priority.ValueType") -> Priority:
    """Return the priority; UNSPECIFIED is interactive."""
    return Priority.BATCH if value == pb.PRIORITY_BATCH else Priority.INTERACTIVE


def sampling_to_pb(sampling: SamplingParams) -> pb.SamplingParams:
    """Return the message for `sampling`."""
    return pb.SamplingParams(
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        seed=sampling.seed,
        stop_token_ids=sampling.stop_token_ids,
        top_logprobs=sampling.top_logprobs,
        ignore_eos=sampling.ignore_eos,
    )


def sampling_from_pb(message: pb.SamplingParams) -> SamplingParams:
    """Return checked sampling parameters; raise InvalidRequest when a limit is broken."""
    return SamplingParams(
        max_tokens=message.max_tokens,
        temperature=message.temperature,
        top_p=message.top_p,
        top_k=message.top_k,
        seed=message.seed,
        stop_token_ids=tuple(message.stop_token_ids),
        top_logprobs=message.top_logprobs,
        ignore_eos=message.ignore_eos,
    )


def job_to_pb(job: Job) -> pb.Job:
    """Return the message for `job`."""
    return pb.Job(
        job_id=job.job_id,
        request_id=job.request_id,
        model=job.model,
        epoch=job.epoch,
        router_id=job.router_id,
        router_address=job.router_address,
        prompt_token_ids=job.prompt_token_ids,
        generated_token_ids=job.generated_token_ids,
        sampling=sampling_to_pb(job.sampling),
        deadline_unix_s=job.deadline_unix_s,
        priority=priority_to_pb(job.priority),
        tenant=job.tenant,
        enqueued_unix_s=job.enqueued_unix_s,
        adapter=job.adapter,
        draft_token_ids=job.draft_token_ids,
        gather_s=job.gather_s,
    )


def job_from_pb(message: pb.Job) -> Job:
    """Return the job; raise InvalidRequest when a field that names or owns it is missing."""
    for field in ("job_id", "model", "epoch", "router_id", "router_address"):
        if not getattr(message, field):
            raise InvalidRequest(f"job without {field}", param=field)
    return Job(
        job_id=JobId(message.job_id),
        request_id=RequestId(message.request_id),
        model=ModelName(message.model),
        epoch=Epoch(message.epoch),
        router_id=RouterId(message.router_id),
        router_address=message.router_address,
        prompt_token_ids=tuple(message.prompt_token_ids),
        generated_token_ids=tuple(message.generated_token_ids),
        sampling=sampling_from_pb(message.sampling),
        deadline_unix_s=message.deadline_unix_s,
        priority=priority_from_pb(message.priority),
        tenant=message.tenant,
        enqueued_unix_s=message.enqueued_unix_s,
        adapter=message.adapter,
        draft_token_ids=tuple(message.draft_token_ids),
        gather_s=message.gather_s,
    )


def token_run_to_pb(run: TokenRun) -> pb.TokenRun:
    """Return the message for `run`."""
    return pb.TokenRun(
        job_id=run.job_id,
        epoch=run.epoch,
        index=run.index,
        token_ids=run.token_ids,
        logprobs=run.logprobs,
        margins=run.margins,
        alternatives=[_alternatives_to_pb(position) for position in run.alternatives],
        finish=FINISH_TO_PB[run.finish] if run.finish else pb.FINISH_REASON_UNSPECIFIED,
        error=run.error,
        cached_tokens=run.cached_tokens,
        draft_tokens=run.draft_tokens,
        accepted_draft_tokens=run.accepted_draft_tokens,
        device_s=run.device_s,
        held_s=run.held_s,
    )


def token_run_from_pb(message: pb.TokenRun) -> TokenRun:
    """Return the run; raise InvalidRequest when its per-token lists differ in length."""
    count = len(message.token_ids)
    if len(message.logprobs) != count or len(message.margins) != count:
        raise InvalidRequest("token run with lists of different length", param="logprobs")
    if len(message.alternatives) not in (0, count):
        raise InvalidRequest("token run with missing alternatives", param="alternatives")
    return TokenRun(
        job_id=JobId(message.job_id),
        epoch=Epoch(message.epoch),
        index=message.index,
        token_ids=tuple(message.token_ids),
        logprobs=tuple(message.logprobs),
        margins=tuple(message.margins),
        alternatives=tuple(
            tuple(TokenAlternative(item.token_id, item.logprob) for item in position.alternatives)
            for position in message.alternatives
        ),
        finish=finish_from_pb(message.finish),
        error=message.error,
        cached_tokens=message.cached_tokens,
        draft_tokens=message.draft_tokens,
        accepted_draft_tokens=message.accepted_draft_tokens,
        device_s=message.device_s,
        held_s=message.held_s,
    )


def _alternatives_to_pb(position: tuple[TokenAlternative, ...]) -> pb.TokenAlternatives:
    return pb.TokenAlternatives(
        alternatives=[
            pb.TokenAlternative(token_id=item.token_id, logprob=item.logprob) for item in position
        ]
    )


def timeline_to_pb(timeline: StartTimeline) -> pb.StartTimeline:
    """Return the message for `timeline`."""
    return pb.StartTimeline(
        queued_s=timeline.queued_s,
        remote_s=timeline.remote_s,
        ssd_s=timeline.ssd_s,
        device_s=timeline.device_s,
        attach_s=timeline.attach_s,
        prepare_s=timeline.prepare_s,
        process_s=timeline.process_s,
        build_s=timeline.build_s,
        first_token_s=timeline.first_token_s,
        total_s=timeline.total_s,
        waited_s=timeline.waited_s,
        from_tier=TIER_TO_PB[timeline.from_tier],
    )


def timeline_from_pb(message: pb.StartTimeline) -> StartTimeline:
    """Return the timeline; an unspecified tier reads as SSD."""
    return StartTimeline(
        queued_s=message.queued_s,
        remote_s=message.remote_s,
        ssd_s=message.ssd_s,
        device_s=message.device_s,
        attach_s=message.attach_s,
        prepare_s=message.prepare_s,
        process_s=message.process_s,
        build_s=message.build_s,
        first_token_s=message.first_token_s,
        total_s=message.total_s,
        waited_s=message.waited_s,
        from_tier=TIER_FROM_PB.get(message.from_tier, Tier.SSD),
    )


def replica_to_pb(record: ReplicaRecord) -> pb.Replica:
    """Return the message for `record`."""
    return pb.Replica(
        model=record.model,
        worker_id=record.worker_id,
        node_id=record.node_id,
        state=replica_state_to_pb(record.state),
        running_jobs=record.running_jobs,
        slots=record.slots,
        pid=record.pid,
        timeline=timeline_to_pb(record.timeline),
        error=record.error,
        memory_bytes=record.memory_bytes,
        slowdown=record.slowdown,
    )


def model_to_pb(
    record: ModelRecord,
    readiness: "pb.ModelReadiness.ValueType" = pb.MODEL_READINESS_UNSPECIFIED,
    expected_start_s: float = 0.0,
) -> pb.Model:
    """Return the message for `record` with what is known about its readiness."""
    return pb.Model(
        name=record.name,
        digest=record.digest,
        architecture=record.architecture,
        parameters=record.parameters,
        size_bytes=record.size_bytes,
        context_tokens=record.context_tokens,
        vocabulary_size=record.vocabulary_size,
        source=record.source,
        nodes=record.nodes,
        has_chat_template=record.has_chat_template,
        readiness=readiness,
        expected_start_s=expected_start_s,
        base=record.base,
    )


def _stage_to_pb(stage: Stage) -> pb.Stage:
    message = pb.Stage(model=stage.model, threshold=stage.threshold)
    if stage.self_consistency is not None:
        message.self_consistency.samples = stage.self_consistency.samples
        message.self_consistency.temperature = stage.self_consistency.temperature
    return message


def _stage_from_pb(message: pb.Stage) -> Stage:
    asked = message.self_consistency
    return Stage(
        ModelName(message.model),
        message.threshold if message.HasField("threshold") else None,
        SelfConsistency(asked.samples, asked.temperature or DEFAULT_TEMPERATURE)
        if message.HasField("self_consistency")
        else None,
    )


def deployment_to_pb(record: DeploymentRecord, revision: int = 0) -> pb.Deployment:
    """Return the message for `record` at cluster state revision `revision`."""
    return pb.Deployment(
        name=record.name,
        stages=[_stage_to_pb(stage) for stage in record.stages],
        certainty=record.certainty,
        min_replicas=record.min_replicas,
        max_replicas=record.max_replicas,
        keep_alive_s=record.keep_alive_s,
        revision=revision,
        target_jobs=record.target_jobs,
        target_queued_tokens=record.target_queued_tokens,
        labels=record.labels,
        spread=record.spread,
        accelerators=record.accelerators,
        shadow_share=record.shadow_share,
        cache_bytes=record.cache_bytes,
        escalation=_policy_to_pb(record.escalation),
        streaming=_streaming_to_pb(record.streaming),
    )


def deployment_from_pb(message: pb.Deployment) -> DeploymentRecord:
    """Return the record as it was sent; the router validates it."""
    return DeploymentRecord(
        name=DeploymentName(message.name),
        stages=tuple(_stage_from_pb(stage) for stage in message.stages),
        certainty=message.certainty,
        min_replicas=message.min_replicas,
        max_replicas=message.max_replicas,
        keep_alive_s=message.keep_alive_s,
        target_jobs=message.target_jobs,
        target_queued_tokens=message.target_queued_tokens,
        labels=dict(message.labels),
        spread=message.spread,
        accelerators=message.accelerators or 1,
        shadow_share=message.shadow_share if message.HasField("shadow_share") else None,
        cache_bytes=message.cache_bytes,
        escalation=_policy_from_pb(message.escalation),
        streaming=_streaming_from_pb(message.streaming),
    )


def _streaming_to_pb(streaming: Streaming) -> pb.Streaming:
    return pb.Streaming(
        mode=streaming.mode.value,
        hold_tokens=streaming.hold_tokens,
        finishes_drafts=streaming.finishes_drafts,
    )


def _streaming_from_pb(message: pb.Streaming) -> Streaming:
    """Raises InvalidRequest for an unknown mode."""
    return Streaming(
        parse_stream_mode(message.mode or StreamMode.BUFFER.value, "streaming.mode"),
        message.hold_tokens or DEFAULT_HOLD_TOKENS,
        message.finishes_drafts if message.HasField("finishes_drafts") else None,
    )


def _policy_to_pb(policy: EscalationPolicy) -> pb.EscalationPolicy:
    return pb.EscalationPolicy(
        while_loading=policy.while_loading.value,
        at_deadline=policy.at_deadline.value,
        at_overload=policy.at_overload.value,
        queue_target_s=policy.queue_target_s,
    )


def _policy_from_pb(message: pb.EscalationPolicy) -> EscalationPolicy:
    """Raises InvalidRequest that names the field and what it may be."""
    return EscalationPolicy(
        choice_of(WhileLoading, message.while_loading or "wait", "while_loading"),
        choice_of(AtDeadline, message.at_deadline or "answer", "at_deadline"),
        choice_of(AtOverload, message.at_overload or "wait", "at_overload"),
        message.queue_target_s,
    )
