"""From a profile to a gear plan: certainties calibrated, models sized, latencies simulated."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from gearfall.core.certainty.calibration import Calibration
from gearfall.core.certainty.certainty_bounds import CertaintyBound, bound_of
from gearfall.core.certainty.self_consistency import SelfConsistency
from gearfall.core.errors import InvalidRequest
from gearfall.core.gears.gear_plan import GearPlan
from gearfall.core.ids import ModelName
from gearfall.core.profile import Generation, Profile, ProfiledModel, Speed
from gearfall.core.records import AskedModel
from gearfall.gears.agreement import KeyedAnswers, with_agreement
from gearfall.gears.counted_answers import asked_several, counted, counted_of
from gearfall.gears.placement import Host, Placeable
from gearfall.gears.plan_build import PlanInputs, Target, build_plan
from gearfall.gears.profile_answers import (
    answers_of,
    beginnings,
    certainties_of,
    fit_calibrations,
    learning,
    shuffled,
)
from gearfall.gears.starts import ALWAYS_WARM, StartTerms, Warmth
from gearfall.simulation.cascades.answers import END, Answer, Query
from gearfall.simulation.cascades.plan_latency import PlanLatency, ServedModel, tokens_per_s
from gearfall.simulation.cascades.step_engine import StepSpeed

SIMULATED_QUERIES = 4000
"""Most that are replayed: more would not change a p95, and take time."""
LEVELS = 6
"""Of load, where none are given: each twice the one below it."""


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """What a plan is asked for."""

    name: str
    version: int
    made_unix_s: float
    target: Target
    loads: tuple[float, ...] = ()
    """Tokens a second; empty: LEVELS up to what the cheapest model could serve alone."""
    measure: str = "sequence_probability"
    """Certainty of models without a calibration."""
    is_calibrated: bool = True
    hold_tokens: int = 0
    """Of an answer, the first tokens that a stage is decided on, as `early` does; 0: all."""
    samples: int = 0
    """Answers of which a stage may count those that are the same, where that is cheaper; 0: none
    does."""
    seed: int = 0
    requests: int = 1000
    """Simulated for each gear."""
    cv: float = 2.0
    keep_alive_s: float = math.inf
    """Models leave when nobody asked them for so long; starts then cost what their gear's promise
    says. Infinite: the gear's models are kept warm."""


def plan_from_profile(
    profile: Profile, hosts: Mapping[Host, str], request: PlanRequest
) -> GearPlan:
    """Return the plan for workers, by the device kind of each. Raises InvalidRequest.

    The part of the queries that chooses cascades also fits the calibrations: a certificate stands
    on queries that neither has seen.
    """
    if not hosts:
        raise InvalidRequest("there is no worker to plan for", param="nodes")
    _check_asked(request)
    order = shuffled(profile, request.seed)
    learn = learning(order)
    judged = beginnings(profile, request.hold_tokens)
    several = asked_several(profile, request.samples) if request.samples else None
    calibrations = fit_calibrations(judged, learn.tolist()) if request.is_calibrated else {}
    certainties = certainties_of(judged, calibrations, request.measure)
    served = {model.name: served_on(model, set(hosts.values())) for model in profile.models}
    tokens = {model.name: mean_tokens(model) for model in profile.models}
    capacity = {
        model.name: {
            host.name: tokens_per_s(served[model.name][device], *_means(model))
            for host, device in hosts.items()
        }
        for model in profile.models
    }
    # One speed a model in the simulation: that of the slowest device kind that it may run on.
    slowest = {
        name: max(by_device.values(), key=lambda each: each.speed.step_s(1))
        for name, by_device in served.items()
    }
    latency = PlanLatency(
        queries_of(
            judged, calibrations, request.measure, order[:SIMULATED_QUERIES].tolist(), several
        ),
        slowest,
        tokens,
        requests=request.requests,
        cv=request.cv,
        seed=request.seed,
        hold_tokens=request.hold_tokens,
    )
    inputs = PlanInputs(
        name=request.name,
        version=request.version,
        made_unix_s=request.made_unix_s,
        target=request.target,
        loads=request.loads or _loads(capacity),
        may_drop_loads=not request.loads,
        answers=(
            *answers_of(profile, certainties, hold_tokens=request.hold_tokens),
            *counted_of(profile, several),
        ),
        tokens=tokens,
        order=order,
        models=tuple(
            Placeable(model.name, model.memory_bytes, capacity[model.name])
            for model in profile.models
        ),
        hosts=tuple(hosts),
        digests={model.name: model.digest for model in profile.models},
        cost_unit=profile.cost_unit,
        assumptions=_assumptions(profile, request, calibrations),
        calibrations=calibrations,
        certainty=request.measure,
        warmth=_warmth(profile, capacity, tokens, request.keep_alive_s),
    )
    keyed = _keyed(profile, certainties, order[len(learn) :], several)
    built = replace(_pruned(build_plan(inputs, latency)), hold_tokens=request.hold_tokens)
    return with_agreement(built, keyed, profile.agreement_rule)


def _check_asked(request: PlanRequest) -> None:
    """Raise InvalidRequest for a burstiness or latency that is none, or for two ways to decide."""
    if request.samples and request.hold_tokens:
        raise InvalidRequest(
            "beginnings of answers can't be the same: ask for hold_tokens or for samples",
            param="samples",
        )
    if not 0.0 < request.cv < math.inf:
        raise InvalidRequest(f"cv {request.cv:g}: finite, above 0; Poisson is 1", param="cv")
    p95_s = request.target.p95_s
    if p95_s is not None and not 0.0 < p95_s < math.inf:
        raise InvalidRequest(
            f"p95 {p95_s:g}: finite seconds, above 0; leave it out to ask for none", param="p95"
        )


def _warmth(
    profile: Profile,
    capacity: Mapping[str, Mapping[str, float]],
    tokens: Mapping[str, float],
    keep_alive_s: float,
) -> Warmth:
    """Return what starts cost, each model's on the slowest worker that it may run on."""
    if math.isinf(keep_alive_s):
        return ALWAYS_WARM
    terms = {}
    for model in profile.models:
        if not model.start_s:
            raise InvalidRequest(
                f"{model.name} has no start time in the profile: measure it with `gearfall "
                "profile`, or plan for models that are kept warm",
                param="keep_alive",
            )
        cost = sum(each.cost for each in model.generations) / len(model.generations)
        cost_per_s = min(capacity[model.name].values()) * cost / tokens[model.name]
        # What went away for want of requests was there a moment ago: its bytes are near.
        terms[model.name] = StartTerms(min(model.start_s.values()), cost_per_s)
    return Warmth(keep_alive_s, terms)


def _keyed(
    profile: Profile,
    certainties: Mapping[str, Sequence[float]],
    rows: npt.NDArray[np.intp],
    several: SelfConsistency | None,
) -> dict[AskedModel, KeyedAnswers]:
    """Return the answers to the testing queries of models whose texts are known."""
    found: dict[AskedModel, KeyedAnswers] = {}
    for model in profile.models:
        name, answers = ModelName(model.name), model.generations
        if all(each.answer_key for each in answers):
            found[name, None] = KeyedAnswers(
                np.array(certainties[model.name])[rows],
                np.array([each.answer_key for each in answers])[rows],
            )
        if several is not None:
            of_all = [counted(answers[at], several.samples) for at in rows]
            found[name, several] = KeyedAnswers(
                np.array([each.certainty for each in of_all]),
                np.array([each.key for each in of_all]),
            )
    return found


def _pruned(plan: GearPlan) -> GearPlan:
    """Name only models and calibrations that some gear uses."""
    gears = (*plan.gears, *(gear for variant in plan.variants for gear in variant.gears))
    used = {stage.model for gear in gears for stage in gear.stages}
    judged = {
        stage.model for gear in gears for stage in gear.stages[:-1] if not stage.self_consistency
    }
    return replace(
        plan,
        models={name: digest for name, digest in plan.models.items() if name in used},
        calibrations={name: each for name, each in plan.calibrations.items() if name in judged},
    )


def queries_of(
    profile: Profile,
    calibrations: Mapping[str, Calibration],
    measure: str,
    rows: Sequence[int] | None = None,
    several: SelfConsistency | None = None,
) -> list[Query]:
    """Return what each model answers to each query, or to those of `rows`.

    Stages are decided on as many tokens as the profile has log-probabilities of (`beginnings`), or
    on equal answers of those that are asked for as `several` says.
    """
    certainties = certainties_of(profile, calibrations, measure)
    return [
        {
            ModelName(model.name): _answer(
                model.generations[at],
                certainties[model.name][at],
                bound_of(measure, calibrations.get(model.name)),
                several,
            )
            for model in profile.models
        }
        for at in (range(len(profile.queries)) if rows is None else rows)
    ]


def _answer(
    each: Generation, certainty: float, bound: CertaintyBound, several: SelfConsistency | None
) -> Answer:
    """Return an answer with what it could still reach after each of its tokens."""
    reach, count = [], max(1, each.output_tokens)
    decided = min(count, len(each.logprobs))
    for at, (logprob, margin) in enumerate(zip(each.logprobs, each.margins, strict=True), start=1):
        bound.add(logprob, margin)
        reach.append(bound.most(max(0, decided - at)))
    # An answer that ended has one token more than its text; no text has a token below 0.
    ended = (END,) if each.token_ids and len(each.token_ids) < count else ()
    token_ids = (*each.token_ids, *ended)
    return Answer(
        max(1, each.prompt_tokens),
        count,
        certainty,
        each.quality,
        each.cost,
        token_ids,
        tuple(reach),
        counted=None if several is None else _counted(each, token_ids, several),
    )


def _counted(each: Generation, token_ids: tuple[int, ...], several: SelfConsistency) -> Answer:
    """Return what several answers come to; the tokens of one that was drawn are not known."""
    found = counted(each, several.samples)
    own, *beside = found.output_tokens
    return Answer(
        max(1, each.prompt_tokens),
        own,
        found.certainty,
        found.quality,
        found.cost,
        token_ids if found.key == each.answer_key else (),
        beside=tuple(beside),
    )


def _means(model: ProfiledModel) -> tuple[float, float]:
    """Return the mean prompt and answer tokens."""
    prompts = [max(1, each.prompt_tokens) for each in model.generations]
    outputs = [max(1, each.output_tokens) for each in model.generations]
    return sum(prompts) / len(prompts), sum(outputs) / len(outputs)


def mean_tokens(model: ProfiledModel) -> float:
    """Return the tokens of a request there, prompt and answer."""
    return sum(_means(model))


def served_on(model: ProfiledModel, devices: set[str]) -> dict[str, ServedModel]:
    """Return how a replica serves, by device kind. Raises InvalidRequest for an unknown one."""
    missing = sorted(devices - model.speeds.keys())
    if missing:
        raise InvalidRequest(
            f"{model.name} was not profiled on {missing[0]}: its speed there is not known. Run "
            "`gearfall profile` on a cluster with such a worker",
            param="profile",
        )
    if model.memory_bytes <= 0 or model.slots < 1:
        raise InvalidRequest(
            f"{model.name}: {model.memory_bytes} bytes and {model.slots} slots; a profile that is "
            "planned from says what a replica needs",
            param="profile",
        )
    return {
        device: ServedModel(_step_speed(model.speeds[device], model.slots), model.slots)
        for device in sorted(devices)
    }


def _step_speed(speed: Speed, slots: int) -> StepSpeed:
    """Return the speed as measured; where only the line through it is known, that."""
    line = ((1, speed.step_s), (slots + 1, speed.step_s + slots * speed.step_s_per_job))
    return StepSpeed(
        speed.steps or line,
        speed.prefill_s_per_token,
        speed.job_s,
        speed.request_s,
        speed.wake_s,
        speed.tell_s,
    )


def _loads(capacity: Mapping[str, Mapping[str, float]]) -> tuple[float, ...]:
    """Return levels up to half of what the fastest model could serve on every worker; those that
    turn out to be beyond reach are dropped."""
    fastest = max(sum(by_host.values()) for by_host in capacity.values())
    return tuple(fastest / 2 / 2**number for number in reversed(range(LEVELS)))


def _assumptions(
    profile: Profile, request: PlanRequest, calibrations: Mapping[str, Calibration]
) -> tuple[str, ...]:
    plain = [model.name for model in profile.models if model.name not in calibrations]
    held = request.hold_tokens
    certainty = f"plain {request.measure} for {', '.join(plain)}" if plain else "all calibrated"
    return (
        f"requests like the profile's {len(profile.queries)} queries",
        f"gaps between arrivals with a CV of {request.cv:g}",
        f"p95 over {request.requests} simulated requests a gear",
        "replicas of one worker share what it computes; " + _stay_text(request.keep_alive_s),
        f"certainty: {certainty}",
        *([f"stages are decided on the first {held} tokens of answers"] if held else ()),
        *([f"stages may count equal ones of {request.samples} answers"] * bool(request.samples)),
    )


def _stay_text(keep_alive_s: float) -> str:
    if math.isinf(keep_alive_s):
        return "models stay where they are placed"
    return f"models leave after {keep_alive_s:g} s without a request (in the cost, not in the p95)"
