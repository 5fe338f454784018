"""Cascades under load in simulated time: fixed replicas, gears that shift, answers from a profile.

Each request is one query of a profile: what each model would answer, how long, how certainly and at
what cost is known, so that latency, quality and cost of a run all come out of one replay. A request
keeps the gear that was in force when it came. Replicas of one worker share its core.

A stage whose answer can't reach its threshold any more ends there. What it said goes up: the next
stage computes it together with the prompt and has those tokens that it would have said itself.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from gearfall.core.claim_rule import batch_rule
from gearfall.core.draft_worth import Agreed, DraftTerms, is_worth_a_token
from gearfall.core.escalation import GoUp, Outlook, Question, decide
from gearfall.core.gear_plan import Gear
from gearfall.core.gear_shift import GearState, LoadSample, ShiftPolicy, shift
from gearfall.core.ids import ModelName
from gearfall.simulation.agenda import Agenda
from gearfall.simulation.answers import Answer, Query, shared_tokens
from gearfall.simulation.requests import Job, Request, StageWork
from gearfall.simulation.seats import FixedReplica, Seat, give_credit, next_seat
from gearfall.simulation.step_engine import Cores, StepEngine

SAMPLE_S = 0.1
_MOST_SHADOWS = 2
"""Asked at once, as by a router."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """A query that comes."""

    at_s: float
    query: int


@dataclass(frozen=True, slots=True)
class Answered:
    """What became of one request."""

    at_s: float
    first_token_s: float
    """Until the first token of the answer that was released could be shown: a stage that may be
    overruled shows nothing before it has ended. With a plan for beginnings that is later than
    clients see it: `early` shows an accepted answer from its held tokens on."""
    total_s: float
    quality: float
    cost: float
    stages: int
    """That ran."""
    gear: int


@dataclass(frozen=True, slots=True)
class CascadeRun:
    """Everything that happened."""

    answered: tuple[Answered, ...]
    shifts: tuple[tuple[float, int], ...]
    """(seconds, gear) of each shift, the first gear at 0 included."""
    busy_share: Mapping[str, float]
    """By model and node: share of the slots' time that was used."""
    device_s: float = 0.0
    """Computed by all replicas together."""


@dataclass(slots=True)
class _Request:
    arrival: Arrival
    gear: int
    stage: int = 0
    cost: float = 0.0
    draft: tuple[int, ...] = ()
    """What the stage below said."""
    is_shadow: bool = False
    """Asked of the last stage to compare: nobody waits for it."""


@dataclass(slots=True)
class _World:
    """Owner of one run."""

    queries: Sequence[Query]
    gears: Sequence[Gear]
    policy: ShiftPolicy | None
    state: GearState
    agenda: Agenda = field(default_factory=lambda: Agenda(0.0))
    seats: dict[ModelName, list[Seat]] = field(default_factory=dict)
    waiting: dict[ModelName, deque[tuple[_Request, Job]]] = field(default_factory=dict)
    open: dict[str, tuple[_Request, Seat]] = field(default_factory=dict)
    rules: dict[tuple[int, ModelName], tuple[int, float]] = field(default_factory=dict)
    """For batches, by gear and model."""
    agreed: dict[ModelName, Agreed] = field(default_factory=dict)
    """What became of the drafts that each model verified."""
    answered: list[Answered] = field(default_factory=list)
    shifts: list[tuple[float, int]] = field(default_factory=list)
    arrived_tokens: float = 0.0
    queued: int = 0
    """Jobs so far: their numbers."""
    left: int = 0
    shadow_share: float = 0.0
    shadow_due: float = 0.0
    """Answers of lower stages that are to be compared."""
    shadows: int = 0
    """That run."""

    def arrive(self, arrival: Arrival) -> None:
        request = _Request(arrival, self.state.gear)
        first = self._gear(request).stages[0].model
        answer = self.queries[arrival.query][first]
        self.arrived_tokens += answer.prompt_tokens + answer.output_tokens
        self._queue(request)

    def sample(self) -> None:
        """Shift by what has come since the last sample and what waits."""
        if not self.left or self.policy is None:
            return
        queued = sum(
            job.work.prompt_tokens + job.work.output_tokens
            for jobs in self.waiting.values()
            for _, job in jobs
        )
        seen = LoadSample(self.agenda.now_s, self.arrived_tokens, float(queued))
        self.arrived_tokens = 0.0
        after = shift(self.state, seen, self.gears, self.policy)
        if after.gear != self.state.gear:
            self.shifts.append((self.agenda.now_s, after.gear))
        self.state = after
        if self.agenda.next_s is not None:
            self.agenda.after(SAMPLE_S, self.sample)

    def _gear(self, request: _Request) -> Gear:
        return self.gears[request.gear]

    def _queue(self, request: _Request) -> None:
        gear, now_s = self._gear(request), self.agenda.now_s
        model = gear.stages[request.stage].model
        answer = self.queries[request.arrival.query][model]
        tokens = self._tokens(request, answer)
        right = shared_tokens(request.draft, answer.token_ids)
        if request.draft:
            self.agreed.setdefault(model, Agreed()).learn(len(request.draft), right)
        wrong = len(request.draft) - right
        works = (StageWork(model, answer.prompt_tokens + wrong, tokens),)
        self.queued += 1
        job = Job(Request(self.queued, now_s, works), 0, now_s, now_s)
        job.done_tokens = min(right, tokens - 1)
        whole = answer.prompt_tokens + max(1, answer.output_tokens)
        request.cost += answer.cost * (answer.prompt_tokens + tokens + wrong) / whole
        give_credit(self.seats[model], gear.shares.get(model, {}))
        jobs = self.waiting.setdefault(model, deque())
        jobs.append((request, job))
        self.dispatch(model)

    def _tokens(self, request: _Request, answer: Answer) -> int:
        """Return how many are generated: a hopeless draft goes on while that is worth it.

        No further than the tokens that are decided on: a stage in `early` ends there if it goes up.
        """
        stages = self._gear(request).stages
        tokens = max(1, answer.tokens_until(stages[request.stage].threshold))
        if tokens >= answer.output_tokens or not answer.token_ids:
            return tokens
        below, above = (stages[at].model for at in (request.stage, request.stage + 1))
        rate = self.agreed[above].rate if above in self.agreed else 0.0
        if rate == 0.0:
            return tokens
        speed, next_speed = (self.seats[each][0].replica.speed for each in (below, above))
        terms = DraftTerms(
            rate, speed.step_s(1), next_speed.step_s(1), next_speed.prefill_s_per_token
        )
        most = min(answer.output_tokens, len(answer.reach))
        while tokens < most and is_worth_a_token(tokens, terms):
            tokens += 1
        return tokens

    def _batch_rule(self, model: ModelName) -> tuple[int, float]:
        """Return the rule of the gear in force."""
        key = self.state.gear, model
        if key not in self.rules:
            self.rules[key] = batch_rule(model, (self.gears[self.state.gear],))
        return self.rules[key]

    def dispatch(self, model: ModelName) -> None:
        """Hand waiting jobs to replicas with room, those most behind their share first.

        An idle one waits for as many as the gear in force says; one that computes does not. Who
        waits for company is looked at again when that wait is over, whatever gear is then in force.
        """
        jobs = self.waiting.get(model)
        if not jobs:
            return
        trigger, most_wait_s = self._batch_rule(model)
        while jobs:
            waited_s = self.agenda.now_s - jobs[0][1].arrived_s
            may_begin = len(jobs) >= trigger or waited_s >= most_wait_s - 1e-9
            seat = next_seat(self.seats[model], may_begin=may_begin)
            if seat is None:
                if not may_begin and any(each.has_room for each in self.seats[model]):
                    self.agenda.after(most_wait_s - waited_s, partial(self.dispatch, model))
                return
            request, job = jobs.popleft()
            job.claimed_s = self.agenda.now_s
            seat.take(1, self.agenda.now_s)
            self.open[job.job_id] = (request, seat)
            seat.engine.begin(job)

    def finished(self, job: Job) -> None:
        """A stage has answered."""
        request, seat = self.open.pop(job.job_id)
        seat.take(-1, self.agenda.now_s)
        model = seat.replica.model
        answer = self.queries[request.arrival.query][model]
        if request.is_shadow:
            self.shadows -= 1
            self.dispatch(model)
            return
        stages = self._gear(request).stages
        above = [Outlook() for _ in stages[request.stage + 1 :]]
        threshold = stages[request.stage].threshold
        outcome = decide(Question(request.stage, answer.certainty, threshold, above))
        if isinstance(outcome, GoUp):
            request.draft = answer.token_ids[: job.work.output_tokens]
            request.stage = outcome.index
            self._queue(request)
        else:
            self._release(request, job, answer)
        self.dispatch(model)

    def _release(self, request: _Request, job: Job, answer: Answer) -> None:
        now_s, began_s = self.agenda.now_s, request.arrival.at_s
        last = len(self._gear(request).stages) - 1
        is_last = request.stage == last
        shown_s = job.first_token_s if is_last else now_s
        self.left -= 1
        self.answered.append(
            Answered(
                began_s,
                shown_s - began_s,
                now_s - began_s,
                answer.quality,
                request.cost,
                request.stage + 1,
                request.gear,
            )
        )
        if not is_last:
            self._shadow(request, last)

    def _shadow(self, request: _Request, last: int) -> None:
        """Ask the last stage too, of so many answers; where jobs wait for its model, or enough are
        compared, that one is left out."""
        self.shadow_due += self.shadow_share
        if self.shadow_due < 1.0:
            return
        self.shadow_due -= 1.0
        model = self._gear(request).stages[last].model
        if not self.waiting.get(model) and self.shadows < _MOST_SHADOWS:
            self.shadows += 1
            self._queue(replace(request, stage=last, draft=(), is_shadow=True))


def run_cascades(
    replicas: Sequence[FixedReplica],
    queries: Sequence[Query],
    arrivals: Sequence[Arrival],
    gears: Sequence[Gear],
    *,
    policy: ShiftPolicy | None = None,
    first_gear: int = 0,
    shadow_share: float = 0.0,
) -> CascadeRun:
    """Replay `arrivals` and return what became of each.

    Without a policy `first_gear` stays in force. Every model of every gear needs a replica, and
    every query an answer of every such model. Of the answers of lower stages `shadow_share` are
    asked of the last one too, unless jobs wait for it. Deterministic.
    """
    world = _World(queries, gears, policy, GearState(first_gear, 0.0), shadow_share=shadow_share)
    world.left = len(arrivals)
    world.shifts.append((0.0, first_gear))
    cores: dict[str, Cores] = {}
    for replica in replicas:
        shared = cores.setdefault(replica.worker, Cores()) if replica.worker else None
        engine = StepEngine(replica.speed, world.agenda, world.finished, shared)
        world.seats.setdefault(replica.model, []).append(Seat(replica, engine))
    for arrival in arrivals:
        world.agenda.at(arrival.at_s, partial(world.arrive, arrival))
    if policy is not None:
        world.agenda.at(0.0, world.sample)
    while world.agenda.step():
        pass
    assert len(world.answered) == len(arrivals), "every request is answered"
    device_s = sum(seat.engine.used_s for seats in world.seats.values() for seat in seats)
    return CascadeRun(tuple(world.answered), tuple(world.shifts), _busy(world), device_s)


def _busy(world: _World) -> Mapping[str, float]:
    end_s = max(world.agenda.now_s, 1e-9)
    used: dict[str, float] = {}
    there: dict[str, int] = {}
    for model, seats in world.seats.items():
        for seat in seats:
            seat.take(0, world.agenda.now_s)
            name = f"{model} on {seat.replica.node}"
            used[name] = used.get(name, 0.0) + seat.busy_s
            there[name] = there.get(name, 0) + seat.replica.slots
    return {name: seconds / (there[name] * end_s) for name, seconds in used.items()}
