"""What is expected of a stage, and what is remembered from request to request."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import pytest

from gearfall.core.certainty.escalation import AtOverload, EscalationPolicy, Outlook
from gearfall.core.certainty.escalation_cap import CUT, PERIOD_S
from gearfall.core.errors import Internal
from gearfall.core.ids import DeploymentName, ModelName
from gearfall.core.model_pace import Timing
from gearfall.core.records import Stage
from services.router.stages.prospects import MAX_REMEMBERED, Prospects, RequestProspects
from services.router.stages.stage_plan import StageReady, StageUnfit
from tests.services.router.char_models import model_record

BOTH = DeploymentName("both")
CAPPED = EscalationPolicy(at_overload=AtOverload.ANSWER, queue_target_s=1.0)


@dataclass
class Fleet:
    """Models as the cluster shows them, and what it is told."""

    ready: set[str] = field(default_factory=set)
    starting: set[str] = field(default_factory=set)
    waits_s: dict[str, float] = field(default_factory=dict)
    told: list[tuple[str, str]] = field(default_factory=list)

    def is_ready(self, model: ModelName) -> bool:
        return model in self.ready

    def is_starting(self, model: ModelName) -> bool:
        return model in self.starting

    def expected_start_s(self, model: ModelName) -> float:
        return 0.0 if model in self.ready else 7.0

    def want(self, model: ModelName, prompt_tokens: int, output_tokens: int) -> None:
        self.told.append(("want", f"{model} {prompt_tokens} {output_tokens}"))

    def want_early(self, model: ModelName, output_tokens: int) -> None:
        self.told.append(("want early", f"{model} {output_tokens}"))

    def hint(self, model: ModelName) -> None:
        self.told.append(("hint", model))

    def oldest_wait_s(self, model: ModelName, *, is_batch: bool) -> float:
        return self.waits_s.get(f"{model} batch" if is_batch else model, 0.0)

    def replicas_changed(self) -> None:
        self.told.append(("looked", ""))


@dataclass
class Rig:
    fleet: Fleet = field(default_factory=Fleet)
    now_s: float = 0.0

    def __post_init__(self) -> None:
        self.prospects = Prospects(self.fleet, self.fleet, clock=lambda: self.now_s)

    def request(
        self,
        policy: EscalationPolicy | None = None,
        promised_p95_s: float = 0.0,
        planned_up: Mapping[ModelName, float] | None = None,
    ) -> RequestProspects:
        return self.prospects.for_request(
            BOTH, policy or EscalationPolicy(), promised_p95_s, planned_up or {}
        )


def plan(name: str = "large", *, tokens: int = 10, base: str = "", max_tokens: int = 50) -> Any:
    return StageReady(
        Stage(ModelName(name)),
        model_record(name),
        cast("Any", SimpleNamespace()),
        tuple(range(tokens)),
        max_tokens,
        model_record(base) if base else None,
    )


def timing(tokens: int, first_s: float, further: int = 0, further_s: float = 0.0) -> Timing:
    return Timing(tokens, first_s, further, further_s)


def test_an_outlook_adds_up_start_queue_and_answer():
    rig = Rig()
    request = rig.request()
    rig.fleet.waits_s["large"] = 3.0
    request.learn(plan(), timing(10, 0.5, 20, 1.0), 21)
    assert request.outlook(plan()) == Outlook(False, start_s=7.0, answer_s=1.5)
    rig.fleet.ready.add("large")
    assert request.outlook(plan()) == Outlook(True, queue_s=3.0, answer_s=1.5)
    assert request.outlook(plan(max_tokens=1)).answer_s == pytest.approx(0.5)
    assert request.usual_tokens(plan()) == 21


def test_who_is_interactive_does_not_wait_behind_batch_jobs():
    rig = Rig()
    rig.fleet.ready.add("large")
    rig.fleet.waits_s["large batch"] = 600.0
    assert rig.request().outlook(plan()).queue_s == 0.0
    batch = rig.prospects.for_request(BOTH, EscalationPolicy(), 0.0, is_batch=True)
    assert batch.outlook(plan()).queue_s == 600.0


def test_lengths_are_a_deployments_own_and_paces_a_models():
    rig = Rig()
    rig.request().learn(plan(), timing(10, 0.5, 20, 1.0), 21)
    other = rig.prospects.for_request(DeploymentName("other"), EscalationPolicy(), 0.0)
    assert other.usual_tokens(plan()) == 0
    assert other.outlook(plan()).answer_s == pytest.approx(0.5)


def test_an_adapter_starts_and_queues_as_its_base_and_answers_at_its_own_pace():
    rig = Rig()
    request = rig.request()
    rig.fleet.ready.add("base")
    rig.fleet.waits_s["base"] = 2.0
    request.learn(plan("tuned", base="base"), timing(10, 0.25), 1)
    assert request.outlook(plan("tuned", base="base")) == Outlook(True, queue_s=2.0, answer_s=0.25)


def test_a_stage_that_can_not_take_the_prompt_takes_no_time_and_nothing_is_told():
    rig = Rig()
    unfit = StageUnfit(Stage(ModelName("large")), Internal("too long"))
    request = rig.request(CAPPED)
    assert request.outlook(unfit) == Outlook()
    request.went_up(unfit)
    request.hint(unfit)
    assert request.go_without(unfit) == 0.0
    assert (rig.fleet.told, dict(rig.prospects.shares())) == ([], {})


def test_a_start_is_charged_once_until_the_model_was_ready():
    rig = Rig()
    assert rig.request().charge_start(plan()) == 7.0
    assert rig.request().charge_start(plan()) == 0.0
    rig.prospects.replicas_changed()
    assert rig.request().charge_start(plan()) == 0.0, "it is not ready yet"
    rig.fleet.ready.add("large")
    rig.prospects.replicas_changed()
    rig.fleet.ready.clear()
    assert rig.request().charge_start(plan()) == 7.0
    rig.fleet.starting.add("other")
    assert rig.request().charge_start(plan("other")) == 0.0, "somebody caused it already"


def test_an_answer_without_a_stage_has_it_started():
    rig = Rig()
    assert rig.request().go_without(plan()) == 7.0
    assert rig.request().go_without(plan()) == 0.0
    assert rig.fleet.told == [("want", "large 10 50")] * 2


def test_hints_are_for_models_that_are_not_ready():
    rig = Rig()
    rig.request().hint(plan())
    rig.fleet.ready.add("large")
    rig.request().hint(plan())
    assert rig.fleet.told == [("hint", "large")]


def test_looking_changes_nothing_about_the_cap():
    rig = Rig()
    rig.fleet.ready.add("large")
    rig.fleet.waits_s["large"] = 5.0
    request = rig.request(CAPPED)
    for _ in range(50):
        assert not request.outlook(plan()).is_capped
    assert not rig.prospects.shares()


@pytest.mark.parametrize(
    ("policy", "promised_p95_s", "target_s"),
    [
        (CAPPED, 0.0, 1.0),
        (CAPPED, 30.0, 1.0),
        (EscalationPolicy(at_overload=AtOverload.ANSWER), 4.0, 3.5),
        (EscalationPolicy(at_overload=AtOverload.ANSWER), 0.5, 0.05),
        (EscalationPolicy(at_overload=AtOverload.ANSWER), 0.0, None),
        (EscalationPolicy(queue_target_s=1.0), 4.0, None),
    ],
)
def test_what_a_queue_is_held_against(policy, promised_p95_s, target_s):
    """The target as it was set, or what the promise leaves beside an answer of half a second."""
    for wait_s, is_long in ((0.0, False), *_around(target_s)):
        rig = Rig()
        rig.fleet.ready.add("large")
        rig.fleet.waits_s["large"] = wait_s
        request = rig.request(policy, promised_p95_s)
        request.learn(plan(), timing(10, 0.5), 1)
        rig.now_s = 100.0
        request.went_up(plan())
        rig.now_s += PERIOD_S
        request.went_up(plan())
        shares = list(rig.prospects.shares().values())
        # Twice too long: cut at the first look, and again a period later.
        assert shares == ([] if target_s is None else [CUT * CUT if is_long else 1.0])


def _around(target_s: float | None) -> tuple[tuple[float, bool], ...]:
    return () if target_s is None else ((target_s * 0.99, False), (target_s * 1.01, True))


def test_what_is_not_used_is_forgotten():
    rig = Rig()
    for number in range(MAX_REMEMBERED + 50):
        rig.request().learn(plan(f"m{number}"), timing(1, 1.0), 1)
    assert rig.request().usual_tokens(plan("m0")) == 0
    assert rig.request().usual_tokens(plan(f"m{MAX_REMEMBERED}")) == 1
