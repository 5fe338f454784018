"""`gearfall deploy`: name a model or a cascade and say how it is kept."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from gearfall.cli.connection import AsJson, Server, connect
from gearfall.cli.render import as_dict, console, print_json, stages_text
from gearfall.core.certainty.escalation import (
    AtDeadline,
    AtOverload,
    EscalationPolicy,
    WhileLoading,
    choice_of,
)
from gearfall.core.certainty.self_consistency import DEFAULT_TEMPERATURE, SelfConsistency
from gearfall.core.errors import InvalidRequest
from gearfall.core.gears.gear_plan import GearPlan
from gearfall.core.gears.gear_plan_checks import parse_plan
from gearfall.core.generation.streaming import (
    DEFAULT_HOLD_TOKENS,
    Streaming,
    StreamMode,
    parse_stream_mode,
)
from gearfall.core.ids import DeploymentName, ModelName
from gearfall.core.records import DeploymentRecord, Stage
from gearfall.infra.net.convert import deployment_to_pb


def deploy(
    name: Annotated[str, typer.Argument(help="Name that clients will ask for.")] = "",
    stage: Annotated[
        list[str] | None,
        typer.Option(
            help="MODEL:THRESHOLD for each stage in order, MODEL for the last; MODEL*3:THRESHOLD: "
            "ask it three times and count the answers that are the same."
        ),
    ] = None,
    file: Annotated[
        Path | None, typer.Option(help="JSON with name, stages, certainty and the rest.")
    ] = None,
    certainty: Annotated[
        str, typer.Option(help="Measure that the thresholds speak about.")
    ] = "sequence_probability",
    min_replicas: Annotated[
        int, typer.Option("--min", "--min-replicas", help="Replicas that stay, of each model.")
    ] = 0,
    max_replicas: Annotated[
        int, typer.Option("--max", "--max-replicas", help="Most replicas of each model.")
    ] = 1,
    keep_alive_s: Annotated[
        float,
        typer.Option(
            "--keep-alive", "--keep-alive-s", help="Seconds that an idle replica stays, at most."
        ),
    ] = 300.0,
    target_jobs: Annotated[
        int, typer.Option(help="Jobs that one replica should run at once; 0: as it has slots.")
    ] = 0,
    target_queued_tokens: Annotated[
        int, typer.Option(help="Tokens to compute that may wait for one replica; 0: any number.")
    ] = 0,
    label: Annotated[
        list[str] | None, typer.Option(help="KEY=VALUE that a worker must bear; repeatable.")
    ] = None,
    spread: Annotated[
        bool, typer.Option("--spread", help="Replicas go to different nodes where there are any.")
    ] = False,
    accelerators: Annotated[
        int, typer.Option(help="Workers of one node that a replica needs together.")
    ] = 1,
    shadow_share: Annotated[
        float | None,
        typer.Option(
            help="Of lower stages' answers, those that the last stage answers too, to compare: 0 "
            "to 0.05. Left out: 0.01 with a plan, 0 without.",
            show_default=False,
        ),
    ] = None,
    cache_bytes: Annotated[
        int, typer.Option(help="Memory in each router for answers that are asked for again.")
    ] = 0,
    while_loading: Annotated[
        str,
        typer.Option(help="Uncertain, and the next model loads: wait for it, or answer."),
    ] = "wait",
    at_deadline: Annotated[
        str,
        typer.Option(help="Uncertain, and no time for the next model: answer, or fail."),
    ] = "answer",
    at_overload: Annotated[
        str,
        typer.Option(help="Uncertain, and a long queue at the next model: wait, or answer."),
    ] = "wait",
    queue_target_s: Annotated[
        float,
        typer.Option(help="Wait in that queue that is too long; 0: the plan's promised p95."),
    ] = 0.0,
    stream_mode: Annotated[
        StreamMode | None,
        typer.Option(
            help="What clients see before it is decided who answers. Default: buffer; early with a "
            "plan that decides on beginnings."
        ),
    ] = None,
    hold_tokens: Annotated[
        int | None,
        typer.Option(
            help="With early: tokens that are held back and decided on. Default: as many as the "
            f"plan decides on, else {DEFAULT_HOLD_TOKENS}."
        ),
    ] = None,
    finish_drafts: Annotated[
        bool | None,
        typer.Option(
            "--finish-drafts/--stop-drafts",
            help="Drafts that can't be accepted any more are finished, for the next model to "
            "verify, or stopped at once. Default: they go on while that saves the next model time.",
        ),
    ] = None,
    plan: Annotated[
        Path | None, typer.Option(help="Gear plan to follow, from `gearfall plan`.")
    ] = None,
    server: Server = "",
    as_json: AsJson = False,
) -> None:
    """Create or replace a deployment."""
    gear_plan = plan.read_bytes() if plan is not None else b""
    escalation = parse_escalation(
        {
            "while_loading": while_loading,
            "at_deadline": at_deadline,
            "at_overload": at_overload,
            "queue_target_s": queue_target_s,
        }
    )
    if gear_plan:
        planned = parse_plan(gear_plan)
        deployment = replace(
            deployment_of_plan(planned, min_replicas, keep_alive_s),
            shadow_share=shadow_share,
            cache_bytes=cache_bytes,
            escalation=escalation,
            streaming=streaming_of(stream_mode, hold_tokens, finish_drafts, planned.hold_tokens),
        )
    elif file is not None:
        deployment = deployment_from_file(file, name)
    else:
        deployment = DeploymentRecord(
            DeploymentName(name),
            tuple(parse_stage(text) for text in stage or ()),
            certainty,
            min_replicas,
            max_replicas,
            keep_alive_s,
            target_jobs,
            target_queued_tokens,
            parse_labels(label or ()),
            spread,
            accelerators,
            shadow_share,
            cache_bytes,
            escalation,
            streaming_of(stream_mode, hold_tokens, finish_drafts),
        )
    with connect(server) as client:
        stored = deployment_to_pb(client.deploy(deployment, gear_plan=gear_plan.decode()))
    if as_json:
        print_json(as_dict(stored))
    else:
        console.print(f"deployed [bold]{stored.name}[/]: {stages_text(stored)}")


def deployment_of_plan(
    plan: GearPlan, min_replicas: int = 0, keep_alive_s: float = 300.0
) -> DeploymentRecord:
    """Return the deployment that a plan is for: its first gear's stages, room for all replicas."""
    counts = Counter[str]()
    for placed in plan.placement:
        counts[placed.model] += placed.count
    return DeploymentRecord(
        DeploymentName(plan.name),
        plan.gears[0].stages,
        plan.certainty,
        min_replicas,
        max(*counts.values(), min_replicas),
        keep_alive_s,
        streaming=streaming_of(None, None, None, plan.hold_tokens),
    )


def streaming_of(
    mode: StreamMode | None,
    hold_tokens: int | None,
    finishes_drafts: bool | None,
    planned: int = 0,
) -> Streaming:
    """Return the streaming that flags ask for, None: the default. `planned`: tokens that the
    deployment's plan decides on, 0 for whole answers. Raises InvalidRequest for other ones."""
    if planned and hold_tokens not in (None, planned):
        raise InvalidRequest(
            f"--hold-tokens {hold_tokens}: the plan decides on the first {planned} tokens; leave "
            f"--hold-tokens out, or make a plan with `gearfall plan --hold-tokens {hold_tokens}`",
            param="hold_tokens",
        )
    usual = StreamMode.EARLY if planned else StreamMode.BUFFER
    held = DEFAULT_HOLD_TOKENS if hold_tokens is None else hold_tokens
    return Streaming(mode or usual, planned or held, finishes_drafts)


def parse_stage(text: str) -> Stage:
    """Parse MODEL, MODEL:THRESHOLD or MODEL*SAMPLES:THRESHOLD.

    Raises InvalidRequest when a threshold or a number of samples is no number.
    """
    asked, has_threshold, threshold = text.partition(":")
    model, has_samples, samples = asked.partition("*")
    try:
        return Stage(
            ModelName(model),
            float(threshold) if has_threshold else None,
            SelfConsistency(int(samples)) if has_samples else None,
        )
    except ValueError:
        raise InvalidRequest(
            f"--stage {text!r}: MODEL:THRESHOLD, or MODEL*SAMPLES:THRESHOLD, in numbers",
            param="stage",
        ) from None


def parse_labels(texts: Sequence[str]) -> dict[str, str]:
    """Parse KEY=VALUE each; raise InvalidRequest on anything else, or a key that stands twice."""
    labels: dict[str, str] = {}
    for text in texts:
        key, separator, value = text.partition("=")
        if not separator or not key:
            raise InvalidRequest(f"--label {text!r} must be KEY=VALUE", param="label")
        if labels.setdefault(key, value) != value:
            raise InvalidRequest(f"--label {key} stands twice with two values", param="label")
    return labels


def parse_escalation(fields: dict[str, Any]) -> EscalationPolicy:
    """Return the policy of a deployment's file or flags; InvalidRequest names what can't be."""
    unknown = fields.keys() - {"while_loading", "at_deadline", "at_overload", "queue_target_s"}
    if unknown:
        name = min(unknown)
        raise InvalidRequest(f"escalation has no {name[:40]!r}", param=f"escalation.{name[:40]}")
    return EscalationPolicy(
        choice_of(WhileLoading, str(fields.get("while_loading", "wait")), "while_loading"),
        choice_of(AtDeadline, str(fields.get("at_deadline", "answer")), "at_deadline"),
        choice_of(AtOverload, str(fields.get("at_overload", "wait")), "at_overload"),
        float(fields.get("queue_target_s", 0.0)),
    )


def parse_streaming(fields: dict[str, Any]) -> Streaming:
    """Return the streaming of a deployment's file; InvalidRequest names what can't be."""
    unknown = fields.keys() - {"mode", "hold_tokens", "finishes_drafts"}
    if unknown:
        name = min(unknown)
        raise InvalidRequest(f"streaming has no {name[:40]!r}", param=f"streaming.{name[:40]}")
    return Streaming(
        parse_stream_mode(str(fields.get("mode", "buffer")), "streaming.mode"),
        int(fields.get("hold_tokens", DEFAULT_HOLD_TOKENS)),
        None if fields.get("finishes_drafts") is None else bool(fields["finishes_drafts"]),
    )


def deployment_from_file(path: Path, name: str = "") -> DeploymentRecord:
    """Read a deployment; `name` overrides the file's. Raises InvalidRequest naming the field."""
    try:
        fields = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"cannot read deployment {path}: {error}", param="file") from error
    if not isinstance(fields, dict):
        raise InvalidRequest(f"{path} must hold a JSON object", param="file")
    try:
        return _deployment(fields, name)
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidRequest(f"{path}: missing or wrong field: {error}", param="file") from error


def _self_consistency(fields: dict[str, Any] | None) -> SelfConsistency | None:
    if fields is None:
        return None
    return SelfConsistency(
        int(fields["samples"]), float(fields.get("temperature", DEFAULT_TEMPERATURE))
    )


def _deployment(fields: dict[str, Any], name: str) -> DeploymentRecord:
    stages = tuple(
        Stage(
            ModelName(stage["model"]),
            None if stage.get("threshold") is None else float(stage["threshold"]),
            _self_consistency(stage.get("self_consistency")),
        )
        for stage in fields["stages"]
    )
    return DeploymentRecord(
        DeploymentName(name or fields["name"]),
        stages,
        str(fields.get("certainty", "sequence_probability")),
        int(fields.get("min_replicas", 0)),
        int(fields.get("max_replicas", 1)),
        float(fields.get("keep_alive_s", 300.0)),
        int(fields.get("target_jobs", 0)),
        int(fields.get("target_queued_tokens", 0)),
        {str(key): str(value) for key, value in dict(fields.get("labels", {})).items()},
        bool(fields.get("spread", False)),
        int(fields.get("accelerators", 1)),
        None if fields.get("shadow_share") is None else float(fields["shadow_share"]),
        int(fields.get("cache_bytes", 0)),
        parse_escalation(dict(fields.get("escalation", {}))),
        parse_streaming(dict(fields.get("streaming", {}))),
    )
