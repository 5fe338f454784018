"""What asking a stage now is expected to take, and what requests have taught about it.

Start: as `starts.py` says. Queue: how long the oldest unclaimed job of this router has waited.
Answer: the model's pace and the deployment's usual length (`gearfall/core/model_pace.py`), from the
answers that came through here. Whether the cap holds: `gearfall/core/certainty/escalation_cap.py`.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol, TypeVar

from gearfall.core.certainty.draft_worth import Agreed, DraftTerms
from gearfall.core.certainty.escalation import AtOverload, EscalationPolicy, Outlook
from gearfall.core.certainty.escalation_cap import CapState, CapTarget, certain, gone_up, offered
from gearfall.core.ids import DeploymentName, ModelName
from gearfall.core.model_pace import ModelPace, Timing, UsualLength
from services.router.stages.stage_plan import StagePlan, StageReady

MAX_REMEMBERED = 4096
"""Models, and stages of deployments, that something is remembered of; the longest unused go."""

K = TypeVar("K")
V = TypeVar("V")
StageKey = tuple[DeploymentName, ModelName]


class StartOracle(Protocol):
    """What is known about models that are not ready."""

    def is_ready(self, model: ModelName) -> bool:
        """Whether a replica takes jobs."""
        ...

    def is_starting(self, model: ModelName) -> bool:
        """Whether a replica is on its way."""
        ...

    def expected_start_s(self, model: ModelName) -> float:
        """Seconds until one takes jobs; 0 when one does."""
        ...


class ScheduleWishes(Protocol):
    """Who tells the scheduler."""

    def want(self, model: ModelName, prompt_tokens: int, output_tokens: int) -> None:
        """An answer is given without the model."""
        ...

    def want_early(self, model: ModelName, output_tokens: int) -> None:
        """A job for the model is on its way."""
        ...

    def hint(self, model: ModelName) -> None:
        """A draft is likely to ask for the model."""
        ...

    def oldest_wait_s(self, model: ModelName, *, is_batch: bool) -> float:
        """How long the oldest unclaimed job has waited that such a job waits behind; 0 for none."""
        ...

    def replicas_changed(self) -> None:
        """Look what is ready now."""
        ...


class Prospects:
    """Owner of what this router has learned about its models, for all requests."""

    def __init__(
        self,
        starts: StartOracle,
        wishes: ScheduleWishes,
        *,
        clock: Callable[[], float],
    ) -> None:
        """`clock`: monotonic seconds."""
        self._starts = starts
        self._wishes = wishes
        self._clock = clock
        self._paces: OrderedDict[ModelName, ModelPace] = OrderedDict()
        self._lengths: OrderedDict[StageKey, UsualLength] = OrderedDict()
        self._agreed: OrderedDict[StageKey, Agreed] = OrderedDict()
        self._caps: OrderedDict[StageKey, CapState] = OrderedDict()
        self._charged: set[ModelName] = set()
        """Models whose start some request has been charged for since they were last ready."""

    def for_request(
        self,
        deployment: DeploymentName,
        policy: EscalationPolicy,
        promised_p95_s: float,
        planned_up: Mapping[ModelName, float] = MappingProxyType({}),
        *,
        is_batch: bool = False,
    ) -> "RequestProspects":
        """Return what one request's choices ask.

        `promised_p95_s`: of its gear, 0 for none. `planned_up`: by model the share of the answers
        below it that its gear has go up to it.
        """
        return RequestProspects(self, deployment, policy, promised_p95_s, planned_up, is_batch)

    def shares(self) -> Mapping[StageKey, float]:
        """Return the share of uncertain answers that may go up, where a cap is in force."""
        return {key: state.share for key, state in self._caps.items()}

    def replicas_changed(self) -> None:
        """Look which starts are over."""
        self._wishes.replicas_changed()
        self._charged = {each for each in self._charged if not self._starts.is_ready(each)}

    def outlook(
        self, key: StageKey, plan: StageReady, target: CapTarget | None, *, is_batch: bool
    ) -> Outlook:
        """Return what asking `plan` now is expected to take; `target`: None for no cap."""
        host = plan.host.name
        pace, tokens = self._paces.get(plan.record.name), self.usual_tokens(key, plan.max_tokens)
        answer_s = pace.answer_s(len(plan.prompt_token_ids), tokens) if pace else 0.0
        is_ready = self._starts.is_ready(host)
        queue_s = self._wishes.oldest_wait_s(host, is_batch=is_batch) if is_ready else 0.0
        return Outlook(
            is_ready=is_ready,
            start_s=self._starts.expected_start_s(host),
            queue_s=queue_s,
            answer_s=answer_s,
            is_capped=target is not None
            and not self._offered(key, queue_s, answer_s, target).is_open,
        )

    def usual_tokens(self, key: StageKey, at_most: int) -> float:
        """Return how long the stage's answers usually are; 0 before any."""
        length = self._lengths.get(key)
        return length.tokens(at_most) if length else 0.0

    def learn(self, key: StageKey, timing: Timing, tokens: int) -> None:
        """Take one whole answer."""
        _remembered(self._paces, key[1], ModelPace).learn(timing)
        _remembered(self._lengths, key, UsualLength).learn(tokens)

    def learn_draft(self, key: StageKey, verified: int, accepted: int) -> None:
        """Take a draft that the stage verified."""
        _remembered(self._agreed, key, Agreed).learn(verified, accepted)

    def draft_terms(self, key: StageKey, below: ModelName) -> DraftTerms:
        """Return what a further token of a draft of `below` is to the stage; rate 0: unknown."""
        paces = self._paces.get(below), self._paces.get(key[1])
        agreed = self._agreed.get(key)
        if agreed is None or paces[0] is None or paces[1] is None:
            return DraftTerms(0.0, 0.0, 0.0, 0.0)
        below_s, above = paces[0].step_s, paces[1]
        return DraftTerms(agreed.rate, below_s, above.step_s, above.prompt_token_s)

    def note_offer(
        self, key: StageKey, outlook: Outlook, target: CapTarget, *, went_up: bool
    ) -> None:
        """An uncertain answer went up to the stage, or did not because of its cap."""
        _remembered(self._caps, key, CapState)
        state = self._offered(key, outlook.queue_s, outlook.answer_s, target)
        self._caps[key] = gone_up(state) if went_up and state.is_open else state

    def note_certain(self, key: StageKey) -> None:
        """An answer was certain enough not to go up to the stage."""
        if (state := self._caps.get(key)) is not None:
            self._caps[key] = certain(state)

    def is_ready(self, plan: StageReady) -> bool:
        """Whether a replica takes the stage's jobs."""
        return self._starts.is_ready(plan.host.name)

    def charge_start(self, plan: StageReady) -> float:
        """Return the expected seconds of the start that asking `plan` causes.

        0 when its model is ready, or comes already, or another request was charged for it.
        """
        host = plan.host.name
        is_coming = self._starts.is_ready(host) or self._starts.is_starting(host)
        if is_coming or host in self._charged:
            return 0.0
        self._charged.add(host)
        return self._starts.expected_start_s(host)

    def want(self, plan: StageReady) -> None:
        """An answer is given without the stage: have its model started."""
        self._wishes.want(plan.host.name, len(plan.prompt_token_ids), plan.max_tokens)

    def hint(self, plan: StageReady) -> None:
        """A draft is likely to ask for the stage."""
        if not self._starts.is_ready(plan.host.name):
            self._wishes.hint(plan.host.name)

    def _offered(
        self, key: StageKey, queue_s: float, answer_s: float, target: CapTarget
    ) -> CapState:
        state, wait_s = self._caps.get(key, CapState()), target.wait_s(answer_s)
        return offered(state, queue_s, wait_s, self._clock(), target.planned)


@dataclass(frozen=True, slots=True)
class RequestProspects:
    """The same for the stages of one request."""

    owner: Prospects
    deployment: DeploymentName
    policy: EscalationPolicy
    promised_p95_s: float
    planned_up: Mapping[ModelName, float]
    is_batch: bool

    def _target(self, plan: StageReady) -> CapTarget | None:
        policy, promised_s = self.policy, self.promised_p95_s
        if policy.at_overload is AtOverload.WAIT or not (policy.queue_target_s or promised_s):
            return None
        planned = self.planned_up.get(plan.record.name)
        return CapTarget(policy.queue_target_s, promised_s, planned)

    def outlook(self, plan: StagePlan) -> Outlook:
        """Return what asking a stage now is expected to take; one that is unfit takes no time."""
        if not isinstance(plan, StageReady):
            return Outlook()
        target = self._target(plan)
        return self.owner.outlook(self._key(plan), plan, target, is_batch=self.is_batch)

    def learn(self, plan: StageReady, timing: Timing, tokens: int) -> None:
        """Take the stage's whole answer."""
        self.owner.learn(self._key(plan), timing, tokens)

    def learn_draft(self, plan: StageReady, verified: int, accepted: int) -> None:
        """Take a draft that the stage verified."""
        self.owner.learn_draft(self._key(plan), verified, accepted)

    def draft_terms(self, below: StageReady, above: StagePlan) -> DraftTerms:
        """Return what a further token of a draft of `below` is to the stage above."""
        if not isinstance(above, StageReady):
            return DraftTerms(0.0, 0.0, 0.0, 0.0)
        return self.owner.draft_terms(self._key(above), below.record.name)

    def went_up(self, plan: StagePlan) -> None:
        """An uncertain answer goes up to `plan`."""
        self._note_offer(plan, went_up=True)

    def held_back(self, plan: StagePlan) -> None:
        """An uncertain answer is given because `plan`'s queue is too long."""
        self._note_offer(plan, went_up=False)

    def stayed_below(self, plan: StagePlan) -> None:
        """An answer was certain enough not to go up to `plan`."""
        if isinstance(plan, StageReady):
            target = self._target(plan)
            if target is not None and target.planned is not None:
                self.owner.note_certain(self._key(plan))

    def charge_start(self, plan: StageReady) -> float:
        """Return the expected seconds of the start that asking `plan` causes."""
        return self.owner.charge_start(plan)

    def go_without(self, plan: StagePlan) -> float:
        """An answer is given without `plan`, whose model is not ready: have it started.

        Returns the expected seconds of the start that this causes.
        """
        if not isinstance(plan, StageReady):
            return 0.0
        start_s = self.owner.charge_start(plan)
        self.owner.want(plan)
        return start_s

    def hint(self, plan: StagePlan) -> None:
        """A draft is likely to ask for `plan`."""
        if isinstance(plan, StageReady):
            self.owner.hint(plan)

    def is_ready(self, plan: StagePlan) -> bool:
        """Whether there is nothing to start for the stage."""
        return not isinstance(plan, StageReady) or self.owner.is_ready(plan)

    def usual_tokens(self, plan: StageReady) -> float:
        """Return how long the stage's answers usually are; 0 before any."""
        return self.owner.usual_tokens(self._key(plan), plan.max_tokens)

    def _note_offer(self, plan: StagePlan, *, went_up: bool) -> None:
        if isinstance(plan, StageReady) and (target := self._target(plan)) is not None:
            key = self._key(plan)
            outlook = self.owner.outlook(key, plan, target, is_batch=self.is_batch)
            self.owner.note_offer(key, outlook, target, went_up=went_up)

    def _key(self, plan: StageReady) -> StageKey:
        return self.deployment, plan.record.name


def _remembered(table: "OrderedDict[K, V]", key: K, make: Callable[[], V]) -> V:
    """Return the entry of `key`, made if it is new; the longest unused goes when there are many."""
    found = table.get(key)
    if found is None:
        found = table[key] = make()
    table.move_to_end(key)
    if len(table) > MAX_REMEMBERED:
        table.popitem(last=False)
    return found
