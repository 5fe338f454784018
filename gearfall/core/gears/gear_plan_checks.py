"""Reads a gear plan and refuses one that could not be followed, saying where and what to change."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import msgspec

from gearfall.core.certainty.agreement import parse_rule
from gearfall.core.certainty.calibration import check_calibration
from gearfall.core.certainty.certainty import parse_measure
from gearfall.core.certainty.self_consistency import SelfConsistency, check_self_consistency
from gearfall.core.deployment import MAX_REPLICAS
from gearfall.core.errors import InvalidRequest
from gearfall.core.gears.gear_plan import FORMAT_VERSION, Gear, GearPlan, PlacedReplicas
from gearfall.core.generation.streaming import check_hold_tokens
from gearfall.core.ids import ModelName, parse_name
from gearfall.core.records import Stage

MAX_PLAN_BYTES = 1_000_000
MAX_GEARS = 64
MAX_STAGES = 3
MAX_TRIGGER = 4096


def parse_plan(text: str | bytes) -> GearPlan:
    """Return the plan that a file holds. Raises InvalidRequest saying where and what to change."""
    if len(text) > MAX_PLAN_BYTES:
        raise InvalidRequest(f"a gear plan has at most {MAX_PLAN_BYTES} bytes", param="plan")
    try:
        plan = msgspec.json.decode(text, type=GearPlan)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise InvalidRequest(f"this is no gear plan: {error}", param="plan") from error
    check_plan(plan)
    return plan


def check_plan(plan: GearPlan) -> None:
    """Raise InvalidRequest for a plan that could not be followed."""
    if plan.format_version != FORMAT_VERSION:
        raise _broken("format_version", f"{plan.format_version}; this reads {FORMAT_VERSION}")
    parse_name(plan.name, param="plan.name")
    if plan.version < 1:
        raise _broken("version", f"{plan.version}; it begins at 1")
    if not plan.models:
        raise _broken("models", "empty; name each model with its checkpoint's digest")
    parse_measure(plan.certainty)
    parse_rule(plan.agreement_rule, param="plan.agreement_rule")
    if plan.hold_tokens != 0:
        check_hold_tokens(plan.hold_tokens, "plan.hold_tokens")
    for name, calibration in plan.calibrations.items():
        if name not in plan.models:
            raise _broken("calibrations", f"model {name} is not among the plan's models")
        check_calibration(calibration, f"calibrations.{name}")
    _check_gears("gears", plan.gears, plan.models)
    _check_placement("placement", plan.placement, plan.gears)
    _check_counting(plan)
    lost = [variant.lost_node for variant in plan.variants]
    if len(set(lost)) != len(lost):
        raise _broken("variants", "one node is lost twice")
    for number, variant in enumerate(plan.variants):
        where = f"variants[{number}]"
        _check_gears(f"{where}.gears", variant.gears, plan.models)
        _check_placement(f"{where}.placement", variant.placement, variant.gears)
        if any(placed.node == variant.lost_node for placed in variant.placement):
            raise _broken(f"{where}.placement", f"uses the lost node {variant.lost_node}")


def _check_counting(plan: GearPlan) -> None:
    several = counting_of(plan)
    if plan.hold_tokens and several:
        raise _broken(
            "hold_tokens",
            f"{plan.hold_tokens}, and a stage is decided by how many whole answers are the same: "
            "plan with one of --hold-tokens and --samples",
        )
    if len(set(several)) > 1:
        raise _broken("self_consistency", "stages differ in it; a plan has one for all that count")


def counting_of(plan: GearPlan) -> list[SelfConsistency]:
    """Return how the stages ask that count equal answers, those of variants too."""
    ladders = (plan.gears, *(variant.gears for variant in plan.variants))
    stages = (stage for gears in ladders for gear in gears for stage in gear.stages)
    return [stage.self_consistency for stage in stages if stage.self_consistency]


def _check_gears(where: str, gears: Sequence[Gear], models: Mapping[str, str]) -> None:
    if not 1 <= len(gears) <= MAX_GEARS:
        raise _broken(where, f"{len(gears)} gears; 1 to {MAX_GEARS}")
    for number, gear in enumerate(gears):
        _check_gear(f"{where}[{number}]", gear, models)
    if any(low.max_load >= high.max_load for low, high in pairwise(gears)):
        raise _broken(where, "max_load must rise from gear to gear")


def _check_gear(where: str, gear: Gear, models: Mapping[str, str]) -> None:
    _check_number(f"{where}.max_load", gear.max_load, above=0.0)
    _check_stages(f"{where}.stages", gear.stages)
    for name in (*(stage.model for stage in gear.stages), *gear.triggers, *gear.shares):
        if name not in models:
            raise _broken(where, f"model {name} is not among the plan's models")
    _check_promise(f"{where}.promise", gear)
    for name, trigger in gear.triggers.items():
        if not 1 <= trigger <= MAX_TRIGGER:
            raise _broken(f"{where}.triggers.{name}", f"{trigger}; 1 to {MAX_TRIGGER} jobs")
    for name, shares in gear.shares.items():
        for node, share in shares.items():
            _check_number(f"{where}.shares.{name}.{node}", share, above=-1.0, most=1.0)
        if not math.isclose(sum(shares.values()), 1.0, abs_tol=1e-6):
            raise _broken(f"{where}.shares.{name}", f"add up to {sum(shares.values()):g}, not 1")


def _check_stages(where: str, stages: Sequence[Stage]) -> None:
    if not 1 <= len(stages) <= MAX_STAGES:
        raise _broken(where, f"{len(stages)} stages; 1 to {MAX_STAGES}")
    if len({stage.model for stage in stages}) != len(stages):
        raise _broken(where, "a model stands in it twice")
    for stage in stages[:-1]:
        _check_number(where, stage.threshold, above=-1.0, most=1.0)
        if stage.self_consistency is not None:
            check_self_consistency(stage.self_consistency, f"gear plan, {where}.self_consistency")
    if stages[-1].threshold is not None or stages[-1].self_consistency is not None:
        raise _broken(
            where, "the last stage has no threshold and no self_consistency: it always answers"
        )


def _check_promise(where: str, gear: Gear) -> None:
    promise = gear.promise
    for name in ("quality", "quality_bound", "delta"):
        _check_number(f"{where}.{name}", getattr(promise, name), above=-1.0, most=1.0)
    _check_number(f"{where}.cost", promise.cost, above=0.0)
    _check_number(f"{where}.p95_s", promise.p95_s, above=-1.0)
    _check_number(f"{where}.start_cost", promise.start_cost, above=-1.0, most=promise.cost)
    if promise.loss_bound is not None:
        _check_number(f"{where}.loss_bound", promise.loss_bound, above=-1.0, most=1.0)
    if promise.queries < 0:
        raise _broken(f"{where}.queries", f"{promise.queries}; not negative")
    if len(promise.escalated) != len(gear.stages):
        raise _broken(f"{where}.escalated", "one share for each stage")
    for share in promise.escalated:
        _check_number(f"{where}.escalated", share, above=-1.0, most=1.0)
    _check_agreement(where, gear)


def _check_agreement(where: str, gear: Gear) -> None:
    agreement, accepted = gear.promise.agreement, gear.promise.accepted
    if len(agreement) != len(accepted) or len(agreement) not in (0, len(gear.stages) - 1):
        raise _broken(
            f"{where}.agreement", "one share and one number accepted for each stage but the last"
        )
    for share, count in zip(agreement, accepted, strict=True):
        if count < 0 or (share is None) != (count == 0):
            raise _broken(f"{where}.accepted", f"{count} answers for an agreement of {share}")
        if share is not None:
            _check_number(f"{where}.agreement", share, above=-1.0, most=1.0)


def _check_placement(
    where: str, placement: Sequence[PlacedReplicas], gears: Sequence[Gear]
) -> None:
    places = [(placed.node, placed.model) for placed in placement]
    if len(set(places)) != len(places):
        raise _broken(where, "a model stands twice on one node")
    for placed in placement:
        if not (1 <= placed.count <= MAX_REPLICAS and placed.node):
            what = f"{placed.count} replicas of {placed.model} on {placed.node!r}"
            raise _broken(where, f"{what}; 1 to {MAX_REPLICAS} on a named node")
    needed = {ModelName(stage.model) for gear in gears for stage in gear.stages}
    missing = sorted(needed - {ModelName(placed.model) for placed in placement})
    if missing:
        raise _broken(where, f"{', '.join(missing)} of some gear is placed nowhere")
    nodes = {placed.node for placed in placement}
    for number, gear in enumerate(gears):
        strange = {node for shares in gear.shares.values() for node in shares} - nodes
        if strange:
            raise _broken(f"gears[{number}].shares", f"{min(strange)} is not in {where}")


def _check_number(where: str, value: float | None, *, above: float, most: float = math.inf) -> None:
    """`above` -1 allows 0."""
    low = 0.0 if above < 0 else above
    is_low = value is not None and (value < low or (above >= 0 and value <= low))
    if value is None or not math.isfinite(value) or is_low or value > most:
        allowed = f"in 0 to {most:g}" if most < math.inf else f"finite and above {low:g}"
        raise _broken(where, f"{value}; it must be {allowed}")


def _broken(where: str, what: str) -> InvalidRequest:
    return InvalidRequest(f"gear plan, {where}: {what}", param="plan")
