"""What a reply says beside the text: OpenAI's usage, the `gearfall` object, headers."""

from collections.abc import Iterable, Sequence
from typing import Any

from services.router.generation import ChoiceEnd


def usage_of(ends: Iterable[ChoiceEnd], n: int) -> dict[str, Any]:
    """Return OpenAI's usage of the answering stages; a prompt of `n` choices counts once."""
    prompt = completion = cached = 0
    for end in ends:
        if end.choice % n == 0:
            prompt += end.usage.prompt_tokens
            cached += end.usage.cached_tokens
        completion += end.usage.completion_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def gearfall_of(
    ends: Sequence[ChoiceEnd], *, request_id: str, deployment: str, seed: int, expected_s: float
) -> dict[str, Any]:
    """Return the `gearfall` object: which model answered, which stages ran, what it cost.

    `model` and `stages` are the first choice's; with several choices `choices` has each.
    """
    first = ends[0]
    described: dict[str, Any] = {
        "request_id": request_id,
        "deployment": deployment,
        "seed": seed,
        "expected_start_s": expected_s,
        "cost_flops": sum(end.usage.cost_flops for end in ends),
        "device_s": sum(end.usage.device_s for end in ends),
        "start_s": sum(end.usage.start_s for end in ends),
        **_described(first),
    }
    if len(ends) > 1:
        described["choices"] = [{"index": end.choice, **_described(end)} for end in ends]
    return described


def headers_of(ends: Sequence[ChoiceEnd]) -> dict[str, str]:
    """Return the headers that are known once all choices ended."""
    degraded = {end.degraded.value for end in ends if end.degraded}
    flags = {"x-gearfall-degraded": ",".join(sorted(degraded))} if degraded else {}
    return flags | {
        "x-gearfall-model": _listed(end.model for end in ends),
        "x-gearfall-stages": _listed(
            ",".join(report.model for report in end.stages) for end in ends
        ),
        "x-gearfall-cost-flops": f"{sum(end.usage.cost_flops for end in ends):.0f}",
        "x-gearfall-device-s": f"{sum(end.usage.device_s for end in ends):.6f}",
    }


def _listed(texts: Iterable[str]) -> str:
    """One text if all choices agree, else all, separated by semicolons."""
    values = list(texts)
    return values[0] if len(set(values)) == 1 else ";".join(values)


def _described(end: ChoiceEnd) -> dict[str, Any]:
    return {
        "model": end.model,
        "finish": end.finish.value,
        "degraded": end.degraded.value if end.degraded else None,
        "stages": [
            {
                "model": report.model,
                "measure": report.measure,
                "certainty": report.certainty,
                "threshold": report.threshold,
                "prompt_tokens": report.prompt_tokens,
                "cached_tokens": report.cached_tokens,
                "completion_tokens": report.completion_tokens,
                "draft_tokens": report.draft_tokens,
                "accepted_draft_tokens": report.accepted_draft_tokens,
                "cost_flops": report.cost_flops,
                "stopped_early": report.stopped_early,
                "spared_tokens": report.spared_tokens,
                "device_s": report.device_s,
                "start_s": report.start_s,
                "duration_s": report.duration_s,
                "queued_s": report.queued_s,
                "epochs": report.epochs,
                "samples": report.samples,
                "agreeing": report.agreeing,
                "other_prompt_tokens": report.other_prompt_tokens,
                "other_completion_tokens": report.other_completion_tokens,
                "accepted": report.is_accepted,
                "error": report.error or None,
            }
            for report in end.stages
        ],
        "total_tokens": end.usage.total_prompt_tokens + end.usage.total_completion_tokens,
    }
