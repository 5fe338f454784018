"""From measured answers to a plan, and what can't be planned from."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from gearfall.core.certainty.self_consistency import SelfConsistency
from gearfall.core.errors import InvalidRequest
from gearfall.core.gears.gear_plan_checks import check_plan
from gearfall.core.profile import DrawnAnswer, Generation, Profile, ProfiledModel, Speed
from gearfall.gears.placement import Host
from gearfall.gears.plan_build import Target
from gearfall.gears.profile_answers import beginnings, learning, shuffled
from gearfall.simulation.cascades.answers import Answer, Query
from gearfall.simulation.cascades.cascade_outcomes import Arrival
from gearfall.simulation.cascades.cascade_run import run_cascades
from gearfall.simulation.cascades.profile_plan import PlanRequest, plan_from_profile, queries_of
from gearfall.simulation.cascades.seats import FixedReplica
from gearfall.simulation.cascades.step_engine import StepSpeed

COUNT = 400
HOSTS = {Host("w1", "n1", 10**10, 4): "cpu", Host("w2", "n2", 10**10, 4): "cpu"}
REQUEST = PlanRequest("chat", 1, 1.0, Target(p95_s=2.0), requests=100, loads=(200.0, 4000.0))


def profiled(name, skill, cost, step_s, hardness, seed) -> ProfiledModel:
    """Answers of three tokens whose log-probabilities tell of their chance to be right."""
    random = np.random.default_rng(seed)
    chance = np.clip(skill + 0.3 - 0.6 * hardness, 0.02, 0.98)
    right = random.random(COUNT) < chance
    found = []
    for is_right, each in zip(right, chance, strict=True):
        logprobs = tuple(float(x) for x in np.log(each) * random.uniform(0.2, 1.0, 3))
        margins = tuple(float(x) for x in random.exponential(each * 5, 3))
        found.append(Generation(float(is_right), cost, 12, 3, logprobs, margins))
    speed = {"cpu": Speed(step_s / 100, step_s, step_s / 20)}
    return ProfiledModel(name, "d" * 32, 10**9, 8, speed, {"ssd": 0.5}, tuple(found))


@pytest.fixture(scope="module")
def profile() -> Profile:
    hardness = np.random.default_rng(0).random(COUNT)
    models = (
        profiled("small", 0.6, 1.0, 0.005, hardness, 1),
        profiled("large", 0.9, 20.0, 0.08, hardness, 2),
    )
    return Profile(1.0, "FLOP", tuple(f"q{n}" for n in range(COUNT)), models)


def test_a_profile_becomes_a_plan_that_can_be_followed(profile):
    plan = plan_from_profile(profile, HOSTS, REQUEST)
    check_plan(plan)
    assert len(plan.gears) == 2
    assert plan.gears[0].promise.quality > plan.gears[-1].promise.quality
    assert plan.calibrations.keys() <= {"small"}
    assert any("400 queries" in line for line in plan.assumptions)


def test_agreement_is_promised_where_the_answers_are_known(profile):
    assert plan_from_profile(profile, HOSTS, REQUEST).gears[0].promise.agreement == ()
    known = tuple(
        replace(
            model,
            generations=tuple(
                replace(each, answer_key="right" if each.quality else f"{model.name} is wrong")
                for each in model.generations
            ),
        )
        for model in profile.models
    )
    request = replace(REQUEST, loads=(500.0, 1000.0))
    plan = plan_from_profile(replace(profile, models=known), HOSTS, request)
    check_plan(plan)
    (gear, *_) = (each for each in plan.gears if len(each.stages) == 2)
    ((share,), (accepted,)) = gear.promise.agreement, gear.promise.accepted
    assert share is not None
    assert 0.5 < share < 1.0
    assert 0 < accepted < COUNT


def test_without_calibration_the_plain_measure_decides(profile):
    plan = plan_from_profile(profile, HOSTS, replace(REQUEST, is_calibrated=False))
    assert not plan.calibrations
    assert plan.certainty == "sequence_probability"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"speeds": {}}, "not profiled on cpu"),
        ({"memory_bytes": 0}, "0 bytes and 8 slots"),
        ({"slots": 0}, "what a replica needs"),
        ({"memory_bytes": 10**12}, "largest worker has"),
    ],
)
def test_what_can_not_be_planned_from_is_refused(profile, change, says):
    small, large = profile.models
    broken = replace(profile, models=(replace(small, **change), large))
    with pytest.raises(InvalidRequest, match=says):
        plan_from_profile(broken, HOSTS, REQUEST)


def only(profile: Profile, count: int, quality: float | None = None) -> Profile:
    """The first queries; all with one quality, if it is named."""

    def kept(model: ProfiledModel) -> ProfiledModel:
        rows = model.generations[:count]
        changed = [each if quality is None else replace(each, quality=quality) for each in rows]
        return replace(model, generations=tuple(changed))

    models = tuple(kept(model) for model in profile.models)
    return replace(profile, queries=profile.queries[:count], models=models)


@pytest.mark.parametrize(
    ("count", "quality", "target", "says"),
    [
        (5, None, Target(), "5 queries; a plan needs at least 20"),
        (COUNT, 1.0, Target(), "one class only"),
        (COUNT, 0.0, Target(), "one class only"),
        (30, None, Target(), "30 queries: 30% of them choose .* at least 67"),
        (100, None, Target(loss=0.01), "certify a loss of 0.[0-9]+ at least, not 0.01"),
        (COUNT, None, Target(quality=0.98), "certify a quality of 0.[0-9]+ at most, not 0.98"),
        (COUNT, None, Target(p95_s=1e-4), "cheapest cascade that may be used p95 is"),
        (COUNT, None, Target(loss=1.5), "loss 1.5: between 0 and 1"),
    ],
)
def test_too_little_or_too_much_asked_is_refused_with_the_distance(
    profile, count, quality, target, says
):
    with pytest.raises(InvalidRequest, match=says):
        plan_from_profile(only(profile, count, quality), HOSTS, replace(REQUEST, target=target))


def test_models_that_leave_pay_for_their_starts(profile):
    loss = replace(REQUEST, target=Target(loss=0.1), loads=(1.0, 300.0))
    stays = plan_from_profile(profile, HOSTS, loss)
    leaves = plan_from_profile(profile, HOSTS, replace(loss, keep_alive_s=5.0))
    assert all(gear.promise.start_cost == 0.0 for gear in stays.gears)
    assert leaves.gears[0].promise.start_cost > leaves.gears[1].promise.start_cost
    assert any("after 5 s without a request" in line for line in leaves.assumptions)
    unknown = tuple(replace(model, start_s={}) for model in profile.models)
    with pytest.raises(InvalidRequest, match="small has no start time"):
        plan_from_profile(replace(profile, models=unknown), HOSTS, replace(loss, keep_alive_s=5.0))


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_a_burstiness_or_latency_that_is_none_is_refused(profile, value):
    with pytest.raises(InvalidRequest, match=f"cv {value:g}: finite, above 0"):
        plan_from_profile(profile, HOSTS, replace(REQUEST, cv=value))
    with pytest.raises(InvalidRequest, match=f"p95 {value:g}: finite seconds, above 0"):
        plan_from_profile(profile, HOSTS, replace(REQUEST, target=Target(p95_s=value)))


def test_no_workers(profile):
    with pytest.raises(InvalidRequest, match="no worker"):
        plan_from_profile(profile, {}, REQUEST)


def test_a_plan_for_beginnings_is_certified_on_them(profile):
    """A promise about the first token is that of answers of which nothing else is known."""
    target = replace(REQUEST, target=Target(loss=0.12), loads=(200.0,))
    held = plan_from_profile(profile, HOSTS, replace(target, hold_tokens=1))
    check_plan(held)
    assert held.hold_tokens == 1
    assert any("first 1 tokens" in line for line in held.assumptions)
    short = tuple(
        replace(
            model,
            generations=tuple(
                replace(each, logprobs=each.logprobs[:1], margins=each.margins[:1])
                for each in model.generations
            ),
        )
        for model in profile.models
    )
    known = plan_from_profile(replace(profile, models=short), HOSTS, target)
    assert held.calibrations == known.calibrations
    assert [gear.stages for gear in held.gears] == [gear.stages for gear in known.gears]
    plain, begun = ([gear.promise for gear in each.gears] for each in (known, held))
    assert [replace(each, p95_s=0.0, cost=1.0) for each in begun] == [
        replace(each, p95_s=0.0, cost=1.0) for each in plain
    ]
    for ours, other in zip(begun, plain, strict=True):
        # A token that decides is told at once, one of an answer that is taken whole waits for
        # others; of an answer that goes up only the beginning is computed.
        assert ours.p95_s <= other.p95_s
        assert ours.cost < other.cost
    whole = plan_from_profile(profile, HOSTS, target)
    assert whole.hold_tokens == 0
    assert whole.gears[0].stages != held.gears[0].stages


@pytest.mark.parametrize("output_tokens", [3, 0])
def test_beginnings_of_which_nothing_is_known_are_refused(profile, output_tokens):
    """As of imported answers, whose tokens nobody counted."""
    told = {"logprobs": (), "margins": (), "certainty": 0.5, "output_tokens": output_tokens}
    blank = tuple(
        replace(model, generations=tuple(replace(each, **told) for each in model.generations))
        for model in profile.models
    )
    with pytest.raises(InvalidRequest, match="small: the profile has no log-probabilities"):
        plan_from_profile(replace(profile, models=blank), HOSTS, replace(REQUEST, hold_tokens=4))
    with pytest.raises(InvalidRequest, match="hold_tokens -1 must be between"):
        plan_from_profile(profile, HOSTS, replace(REQUEST, hold_tokens=-1))


def test_an_answer_without_tokens_has_no_beginning_and_is_no_hindrance(profile):
    small, large = profile.models
    empty = replace(small.generations[0], output_tokens=0, logprobs=(), margins=(), quality=0.0)
    silent = replace(small, generations=(empty, *small.generations[1:]))
    plan = plan_from_profile(
        replace(profile, models=(silent, large)), HOSTS, replace(REQUEST, hold_tokens=2)
    )
    check_plan(plan)
    assert plan.hold_tokens == 2


@pytest.mark.parametrize("hold_tokens", [2, 6, 0])
def test_the_cost_that_is_promised_is_what_the_simulator_computes(profile, hold_tokens):
    """Of a rejected answer the prompt and the held tokens, or all of them."""
    models = tuple(
        replace(model, generations=tuple(_longer(each, 24) for each in model.generations))
        for model in profile.models
    )
    known = replace(profile, models=models)
    asked = replace(REQUEST, target=Target(loss=0.12), loads=(20.0,), is_calibrated=False)
    plan = plan_from_profile(known, HOSTS, replace(asked, hold_tokens=hold_tokens))
    (gear,) = plan.gears
    assert len(gear.stages) == 2
    judged = beginnings(known, hold_tokens)
    order = shuffled(known)
    tested = order[len(learning(order)) :]
    arrivals = [Arrival(100.0 * at, int(query)) for at, query in enumerate(tested)]
    speed = StepSpeed(((1, 0.01), (16, 0.01)), 0.001)
    replicas = [FixedReplica(stage.model, "n1", speed, 4) for stage in gear.stages]

    def spent(queries: Sequence[Query]) -> float:
        run = run_cascades(replicas, queries, arrivals, [gear], hold_tokens=hold_tokens)
        return sum(each.cost for each in run.answered) / len(run.answered)

    queries = queries_of(judged, {}, plan.certainty)
    to_the_end = [
        {name: _decided_at_the_end(each) for name, each in query.items()} for query in queries
    ]
    assert spent(to_the_end) == pytest.approx(gear.promise.cost)
    assert spent(queries) <= gear.promise.cost  # hopeless drafts end before


def _decided_at_the_end(each: Answer) -> Answer:
    """The same answer, of which nothing is known before all tokens that decide are there."""
    return replace(each, reach=(*(1.0,) * (len(each.reach) - 1), each.certainty))


def _longer(each: Generation, tokens: int) -> Generation:
    more = tokens - each.output_tokens
    return replace(
        each,
        output_tokens=tokens,
        logprobs=(*each.logprobs, *[-0.01] * more),
        margins=(*each.margins, *[3.0] * more),
    )


def drawn_beside(model: ProfiledModel, agreement: float, seed: int) -> ProfiledModel:
    """Two more answers to each query: the same if it is right, mostly others if it is wrong."""
    random = np.random.default_rng(seed)

    def one(right: float) -> DrawnAnswer:
        same = right or random.random() > agreement
        key = "right" if right else "wrong" if same else f"w{random.random()}"
        return DrawnAnswer(key, right, model.generations[0].cost, 3, 0.1)

    return replace(
        model,
        generations=tuple(
            replace(
                each,
                answer_key="right" if each.quality else "wrong",
                drawn=(one(each.quality), one(each.quality)),
            )
            for each in model.generations
        ),
    )


def test_stages_count_equal_answers_where_that_tells_more_than_it_costs(profile):
    """Log-probabilities that say little, and answers that agree when they are right."""
    small, large = (drawn_beside(model, 0.95, seed) for seed, model in enumerate(profile.models))
    known = replace(profile, models=(small, large))
    asked = replace(REQUEST, target=Target(loss=0.08), loads=(100.0,))
    plan = plan_from_profile(known, HOSTS, replace(asked, samples=3))
    check_plan(plan)
    (gear,) = plan.gears
    first = gear.stages[0]
    assert (first.model, first.self_consistency) == ("small", SelfConsistency(3))
    assert "small" not in plan.calibrations  # nothing is measured on log-probabilities
    assert any("equal ones of 3 answers" in line for line in plan.assumptions)
    without = plan_from_profile(known, HOSTS, asked)
    assert gear.promise.cost < without.gears[0].promise.cost
    assert gear.promise.cost > 3.0 * small.generations[0].cost
    ((share,), (accepted,)) = gear.promise.agreement, gear.promise.accepted
    assert share is not None
    assert 0.5 < share < 1.0
    assert accepted > 0


def test_what_can_not_be_counted_is_refused(profile):
    with pytest.raises(InvalidRequest, match="0 drawn answers beside each one, 2 are needed"):
        plan_from_profile(profile, HOSTS, replace(REQUEST, samples=3))
    with pytest.raises(InvalidRequest, match="ask for hold_tokens or for samples"):
        plan_from_profile(profile, HOSTS, replace(REQUEST, samples=3, hold_tokens=2))
