"""A gear plan: which cascade answers at which load, where its models run, and what that promises.

The file is JSON that people read and sign off; `gear_plan_checks.parse_plan` reads it. CascadeServe
(arXiv 2406.14424): a gear is a cascade with what it needs to run at one range of load.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from itertools import pairwise
from typing import Any

import msgspec

from gearfall.core.certainty.calibration import Calibration
from gearfall.core.ids import ModelName
from gearfall.core.records import Stage

FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True)
class Promise:
    """What a gear is planned to give; the online system watches whether it does."""

    quality: float
    """Expected share of right answers, in [0, 1]."""
    quality_bound: float
    """Quality that holds with probability 1 - delta; 0 where nothing was certified."""
    delta: float
    queries: int
    """Behind the bound."""
    cost: float
    """Mean of a request, in the plan's unit."""
    p95_s: float
    """Of a whole answer, at the gear's highest load."""
    escalated: tuple[float, ...]
    """Share of requests that reach each stage; 1 for the first."""
    agreement: tuple[float | None, ...] = ()
    """By stage but the last: of the answers it accepts, the share that agrees with what the last
    one answers; None where it accepted none, empty where the profile does not tell."""
    accepted: tuple[int, ...] = ()
    """Queries behind each of `agreement`."""
    loss_bound: float | None = None
    """Quality lost against the best model that holds with probability 1 - delta, where it was asked
    for."""
    start_cost: float = 0.0
    """Part of `cost`: starts of models that are not kept warm between two requests."""


@dataclass(frozen=True, slots=True)
class Gear:
    """One cascade for one range of load."""

    max_load: float
    """Tokens to compute a second, prompt and answer of the requests as they arrive, up to which
    this gear is in force."""
    stages: tuple[Stage, ...]
    promise: Promise
    triggers: dict[str, int] = field(default_factory=dict)
    """By model: jobs that are waited for before a batch begins; 1 for those not named."""
    shares: dict[str, dict[str, float]] = field(default_factory=dict)
    """By model and node: share of the jobs; evenly over the replicas for models not named."""


@dataclass(frozen=True, slots=True)
class PlacedReplicas:
    """Replicas of one model on one node."""

    node: str
    model: str
    count: int


@dataclass(frozen=True, slots=True)
class Variant:
    """The same plan with one node gone."""

    lost_node: str
    gears: tuple[Gear, ...]
    placement: tuple[PlacedReplicas, ...]


@dataclass(frozen=True, slots=True)
class GearPlan:
    """A whole plan. Gears by rising load and, as far as possible, falling quality."""

    name: str
    """Of the deployment that it is for."""
    version: int
    """Rises with each plan of that name."""
    made_unix_s: float
    target: str
    """What was asked for, in words: `p95 <= 2 s`, `quality >= 0.9 with delta 0.05`."""
    cost_unit: str
    models: dict[str, str]
    """Digest of each model's checkpoint: a plan speaks about bytes, not about names."""
    gears: tuple[Gear, ...]
    placement: tuple[PlacedReplicas, ...]
    assumptions: tuple[str, ...] = ()
    variants: tuple[Variant, ...] = ()
    certainty: str = "sequence_probability"
    """The measure of stages whose model has no calibration here."""
    calibrations: dict[str, Calibration] = field(default_factory=dict)
    """By model: thresholds of its stages are probabilities that the answer is right."""
    format_version: int = FORMAT_VERSION
    agreement_rule: str = "exact"
    """When two answers agree, as in `gearfall.core.certainty.agreement`."""
    hold_tokens: int = 0
    """Of an answer, the first tokens that certainties are measured on, and promised for; 0: all."""


def plan_text(plan: GearPlan) -> str:
    """Return the plan as the file that `parse_plan` reads, two spaces a level."""
    return msgspec.json.format(msgspec.json.encode(plan), indent=2).decode() + "\n"


def gear_for(gears: Sequence[Gear], load: float) -> int:
    """Return the index of the gear meant for a load: the first that holds it, else the last."""
    return next((at for at, gear in enumerate(gears) if load <= gear.max_load), len(gears) - 1)


def planned_up(stages: Sequence[Stage], promise: Promise) -> dict[ModelName, float]:
    """Return by model the share of the answers below it that a plan has go up to it."""
    steps = zip(stages[1:], pairwise(promise.escalated), strict=False)
    return {
        stage.model: above / reached for stage, (reached, above) in steps if 0.0 < above <= reached
    }


def plan_diff(old: GearPlan, new: GearPlan) -> tuple[str, ...]:
    """Return one line for each value that differs: its path, what it was, what it is."""
    return tuple(_differences("", old, new))


def _differences(where: str, old: Any, new: Any) -> list[str]:
    if is_dataclass(old) and is_dataclass(new) and type(old) is type(new):
        names = [each.name for each in fields(old)]
        pairs = [(name, getattr(old, name), getattr(new, name)) for name in names]
    elif isinstance(old, dict) and isinstance(new, dict):
        pairs = [(key, old.get(key), new.get(key)) for key in sorted({*old, *new})]
    elif isinstance(old, tuple) and isinstance(new, tuple):
        longest = max(len(old), len(new))
        filled = [each + (None,) * (longest - len(each)) for each in (old, new)]
        pairs = [(str(at), a, b) for at, (a, b) in enumerate(zip(*filled, strict=True))]
    else:
        return [] if old == new else [f"{where}: {_shown(old)} -> {_shown(new)}"]
    prefix = f"{where}." if where else ""
    return [line for name, a, b in pairs for line in _differences(f"{prefix}{name}", a, b)]


def _shown(value: Any) -> str:
    if value is None:
        return "nothing"
    return f"{value:g}" if isinstance(value, float) else msgspec.json.encode(value).decode()
