"""What a deployment must be whatever the cluster is like: refused by client and server alike."""

import math
from collections.abc import Sequence

from gearfall.core.certainty.certainty import parse_measure
from gearfall.core.certainty.escalation import check_policy
from gearfall.core.certainty.self_consistency import check_self_consistency
from gearfall.core.errors import InvalidRequest
from gearfall.core.generation.streaming import StreamMode, check_hold_tokens
from gearfall.core.ids import ModelName, parse_name
from gearfall.core.records import DeploymentRecord, Stage

MAX_STAGES = 8
MAX_REPLICAS = 1024
MAX_ACCELERATORS = 64
MAX_TARGET = 1 << 31
MAX_LABELS = 16
MAX_LABEL_CHARACTERS = 128
MAX_SHADOW_SHARE = 0.05
MIN_CACHE_BYTES = 1 << 16
MAX_CACHE_BYTES = 1 << 36


def check_deployment_shape(record: DeploymentRecord) -> None:
    """Raise InvalidRequest that names the field and says what it has to be."""
    parse_name(record.name, param="name")
    parse_measure(record.certainty)
    _check_stages(record)
    _check_replicas(record)
    _check_labels(record.labels)
    _check_shadow_share(record.shadow_share)
    _check_cache(record.cache_bytes)
    check_policy(record.escalation)
    check_hold_tokens(record.streaming.hold_tokens, "streaming.hold_tokens")
    check_stream_mode(record.stages, record.streaming.mode, "streaming.mode")


def check_stream_mode(stages: Sequence[Stage], mode: StreamMode, param: str) -> None:
    """Raise InvalidRequest where stages that count equal answers would decide on beginnings."""
    if mode is not StreamMode.EARLY:
        return
    counting = [each.model for each in stages if each.self_consistency]
    if counting:
        raise InvalidRequest(
            f"{param} early decides on the first tokens of an answer, and {counting[0]} is decided "
            "by how many whole answers are the same: ask for buffer or draft, or deploy a cascade "
            "without self_consistency",
            param=param,
        )


def _check_replicas(record: DeploymentRecord) -> None:
    _check_whole("min_replicas", record.min_replicas, 0, MAX_REPLICAS)
    _check_whole("max_replicas", record.max_replicas, 1, MAX_REPLICAS)
    _check_whole("target_jobs", record.target_jobs, 0, MAX_TARGET)
    _check_whole("target_queued_tokens", record.target_queued_tokens, 0, MAX_TARGET)
    _check_whole("accelerators", record.accelerators, 1, MAX_ACCELERATORS)
    if record.max_replicas < record.min_replicas:
        raise InvalidRequest(
            f"max_replicas {record.max_replicas} is below min_replicas {record.min_replicas}: "
            f"raise the one or lower the other",
            param="max_replicas",
        )
    if not (math.isfinite(record.keep_alive_s) and record.keep_alive_s >= 0):
        raise InvalidRequest(
            f"keep_alive_s {record.keep_alive_s:g} must be a number of seconds, at least 0",
            param="keep_alive_s",
        )


def _check_whole(field: str, value: int, least: int, most: int) -> None:
    if not least <= value <= most:
        raise InvalidRequest(f"{field} {value} must be between {least} and {most}", param=field)


def _check_stages(record: DeploymentRecord) -> None:
    if not 1 <= len(record.stages) <= MAX_STAGES:
        raise InvalidRequest(f"a deployment has 1 to {MAX_STAGES} stages", param="stages")
    seen: set[ModelName] = set()
    for position, stage in enumerate(record.stages):
        where = f"stages[{position}]"
        if str(stage.model) == record.name:
            raise InvalidRequest(
                f"{record.name} can't be a stage of itself: give the deployment another name",
                param=f"{where}.model",
            )
        if stage.model in seen:
            raise InvalidRequest(
                f"model {stage.model} stands twice: an answer would go round",
                param=f"{where}.model",
            )
        seen.add(stage.model)
        is_last = position == len(record.stages) - 1
        _check_threshold(stage.threshold, is_last, stage.model, where)
        _check_several(stage, is_last, where)


def _check_several(stage: Stage, is_last: bool, where: str) -> None:
    if stage.self_consistency is None:
        return
    if is_last:
        raise InvalidRequest(
            f"the last stage answers whatever its answers have in common: leave out the "
            f"self_consistency of {stage.model}",
            param=f"{where}.self_consistency",
        )
    check_self_consistency(stage.self_consistency, f"{where}.self_consistency")


def _check_threshold(threshold: float | None, is_last: bool, model: ModelName, where: str) -> None:
    if is_last and threshold is not None:
        raise InvalidRequest(
            f"the last stage has no threshold, as no stage is above it: leave out that of {model}",
            param=f"{where}.threshold",
        )
    if not is_last and not (threshold is not None and 0.0 <= threshold <= 1.0):
        said = "has none" if threshold is None else f"has {threshold:g}"
        raise InvalidRequest(
            f"stage {model} needs a threshold between 0 and 1, below which the next one answers; "
            f"it {said}",
            param=f"{where}.threshold",
        )


def _check_labels(labels: dict[str, str]) -> None:
    if len(labels) > MAX_LABELS:
        raise InvalidRequest(f"at most {MAX_LABELS} labels", param="labels")
    for key, value in labels.items():
        if not key or not max(len(key), len(value)) <= MAX_LABEL_CHARACTERS:
            raise InvalidRequest(
                f"label {key[:40]!r}: keys have 1 to {MAX_LABEL_CHARACTERS} characters, values at "
                "most as many",
                param="labels",
            )


def _check_shadow_share(share: float | None) -> None:
    if share is not None and not 0.0 <= share <= MAX_SHADOW_SHARE:
        raise InvalidRequest(
            f"shadow_share {share:g} must be between 0 and {MAX_SHADOW_SHARE:g}: it is the share "
            "of answers that the last stage computes once more",
            param="shadow_share",
        )


def _check_cache(size_bytes: int) -> None:
    if size_bytes != 0 and not MIN_CACHE_BYTES <= size_bytes <= MAX_CACHE_BYTES:
        raise InvalidRequest(
            f"cache_bytes {size_bytes} must be 0, which keeps no answers, or between "
            f"{MIN_CACHE_BYTES} and {MAX_CACHE_BYTES}",
            param="cache_bytes",
        )
