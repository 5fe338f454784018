"""What a job takes beside its steps does not depend on its model: one measure for all.

The way to an engine, telling a token and being woken are what is left of a job when its steps are
taken off. Of a model whose steps take a tenth of a second their spread is left, too, which is more
than all of it; of the model with the shortest steps hardly any is.
"""

from collections.abc import Sequence
from dataclasses import replace

from gearfall.core.profile import ProfiledModel, Speed
from gearfall.profiling.speed import MOST_TOLD


def with_common_overheads(models: Sequence[ProfiledModel]) -> tuple[ProfiledModel, ...]:
    """Return the models, on each device kind with the overheads of the one whose step is shortest
    there.

    What the worker computes for a job stays each model's own: of the fastest its crowd may have
    measured the router.
    """
    fastest: dict[str, Speed] = {}
    for model in models:
        for device, speed in model.speeds.items():
            if device not in fastest or speed.step_s < fastest[device].step_s:
                fastest[device] = speed
    return tuple(
        replace(
            model,
            speeds={
                device: _with_overheads(speed, fastest[device])
                for device, speed in model.speeds.items()
            },
        )
        for model in models
    )


def _with_overheads(speed: Speed, like: Speed) -> Speed:
    way_s = like.job_s + like.request_s
    shortest_s = min((seconds for _, seconds in speed.steps), default=speed.step_s)
    job_s = min(speed.job_s, way_s)
    return replace(
        speed,
        job_s=job_s,
        request_s=way_s - job_s,
        wake_s=like.wake_s,
        tell_s=min(like.tell_s, MOST_TOLD * shortest_s),
    )
