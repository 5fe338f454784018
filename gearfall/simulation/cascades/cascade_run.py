"""Cascades under load in simulated time: fixed replicas, gears that shift, answers from a profile.

Each request is one query of a profile: what each model would answer, how long, how certainly and at
what cost is known, so that latency, quality and cost of a run all come out of one replay. A request
keeps the gear that was in force when it came. Replicas of one worker share its core.

A stage whose answer can't reach its threshold any more ends when the router hears of it. What it
said goes up: the next stage computes it together with the prompt and has those tokens that it would
have said itself. Where an answer goes, the router's rules say (`ways_up.py`).
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from gearfall.core.certainty.escalation import EscalationPolicy, GoUp, Outcome, Settle
from gearfall.core.gears.claim_rule import batch_rule
from gearfall.core.gears.gear_plan import Gear
from gearfall.core.gears.gear_shift import GearState, LoadSample, ShiftPolicy, shift
from gearfall.core.generation.job import GATHER_S
from gearfall.core.ids import ModelName
from gearfall.core.model_pace import Timing
from gearfall.simulation.agenda import Agenda
from gearfall.simulation.cascades.answers import Answer, Query, answer_at, shared_tokens
from gearfall.simulation.cascades.cascade_outcomes import Answered, Arrival, CascadeRun, StageTimes
from gearfall.simulation.cascades.seats import FixedReplica, Seat, give_credit, next_seat
from gearfall.simulation.cascades.step_engine import Cores, StepEngine
from gearfall.simulation.cascades.ways_up import WaysUp
from gearfall.simulation.requests import Job, Request, StageWork

SAMPLE_S = 0.1
_PLAIN = EscalationPolicy()
_NO_SLOWNESS: Mapping[str, Sequence[tuple[float, float]]] = {}
_MOST_SHADOWS = 2
"""Asked at once, as by a router."""


@dataclass(slots=True)
class _Request:
    arrival: Arrival
    gear: int
    stage: int = 0
    cost: float = 0.0
    draft: tuple[int, ...] = ()
    """What the stage below said."""
    right: int = 0
    """Of it, what this one would have said."""
    stopped: GoUp | None = None
    """This stage's draft is stopped to go up there."""
    way_s: float = 0.0
    """Of its job, to the engine."""
    drafted: int | None = None
    """Tokens of it when that was asked last; None: not yet."""
    times: tuple[StageTimes, ...] = ()
    pending: int = 0
    """Jobs of this stage that are not done; more than one where it counts equal answers."""
    is_shadow: bool = False
    """Asked of the last stage to compare: nobody waits for it."""


@dataclass(slots=True)
class _World:
    """Owner of one run."""

    queries: Sequence[Query]
    gears: Sequence[Gear]
    policy: ShiftPolicy | None
    state: GearState
    ways: WaysUp = field(init=False)
    agenda: Agenda = field(default_factory=lambda: Agenda(0.0))
    seats: dict[ModelName, list[Seat]] = field(default_factory=dict)
    waiting: dict[ModelName, deque[tuple[_Request, Job]]] = field(default_factory=dict)
    open: dict[str, tuple[_Request, Seat]] = field(default_factory=dict)
    rules: dict[tuple[int, ModelName], tuple[int, float]] = field(default_factory=dict)
    """For batches, by gear and model."""
    answered: list[Answered] = field(default_factory=list)
    shifts: list[tuple[float, int]] = field(default_factory=list)
    arrived_tokens: float = 0.0
    queued: int = 0
    """Jobs so far: their numbers."""
    left: int = 0
    ended_s: float = 0.0
    """When the last job ended."""
    gather_s: float = 0.0
    is_whole: bool = False
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

    def follow(self, cores: Cores, slowness: Iterator[tuple[float, float]]) -> None:
        """Keep to a worker's slowness as long as there is something to do."""
        since = next(slowness, None)
        if since is None or not self.left:
            return
        at_s, factor = since

        def slow_down() -> None:
            cores.slow_down(factor)
            self.follow(cores, slowness)

        self.agenda.at(max(at_s, self.agenda.now_s), slow_down)

    def _gear(self, request: _Request) -> Gear:
        return self.gears[request.gear]

    def _queue(self, request: _Request) -> None:
        gear, now_s = self._gear(request), self.agenda.now_s
        model, answer = gear.stages[request.stage].model, self._answer(request)
        request.right = shared_tokens(request.draft, answer.token_ids)
        request.stopped = request.drafted = None
        if request.draft:
            self.ways.learn_draft(model, len(request.draft), request.right)
        wrong = len(request.draft) - request.right
        is_last = request.stage == len(gear.stages) - 1
        work = StageWork(
            model,
            answer.prompt_tokens + wrong,
            max(1, answer.output_tokens),
            stop_tokens=0 if is_last else self.ways.stop_tokens(gear, request.stage, answer),
            gather_s=0.0 if is_last and not self.is_whole else self.gather_s,
        )
        works = (work, *(replace(work, output_tokens=tokens) for tokens in answer.beside))
        request.pending = len(works)
        jobs = self.waiting.setdefault(model, deque())
        for each in works:
            self.queued += 1
            job = Job(Request(self.queued, now_s, (each,)), 0, now_s, now_s)
            job.done_tokens = min(request.right, each.output_tokens - 1)
            give_credit(self.seats[model], gear.shares.get(model, {}))
            jobs.append((request, job))
        self.dispatch(model)

    def _answer(self, request: _Request) -> Answer:
        """Return what the request's stage answers."""
        stage = self._gear(request).stages[request.stage]
        return answer_at(self.queries[request.arrival.query], stage)

    def oldest_wait_s(self, model: ModelName) -> float:
        """Return how long the oldest of a model's jobs has waited that nobody has taken."""
        jobs = self.waiting.get(model)
        return self.agenda.now_s - jobs[0][1].arrived_s if jobs else 0.0

    def may_stop(self, job: Job) -> bool:
        """Whether a draft that nothing can save goes up; where it does is then decided."""
        return self._may_stop(self.open[job.job_id][0], job)

    def _may_stop(self, request: _Request, job: Job) -> bool:
        query = self.queries[request.arrival.query]
        # However many came at once: a router looks at one after the other.
        is_first = request.drafted is None
        request.drafted = job.work.stop_tokens if is_first else int(job.done_tokens)
        outcome = self.ways.judge_stop(self._gear(request), request.stage, query)
        request.stopped = outcome if isinstance(outcome, GoUp) else None
        return request.stopped is not None

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
            request.way_s = seat.engine.begin(job)

    def finished(self, job: Job) -> None:
        """A stage has answered."""
        self.ended_s = self.agenda.now_s
        request, seat = self.open.pop(job.job_id)
        seat.take(-1, self.agenda.now_s)
        request.pending -= 1
        if request.is_shadow:
            self.shadows -= 1
        elif not request.pending:
            self._conclude(request, job)
        self.dispatch(seat.replica.model)

    def _conclude(self, request: _Request, job: Job) -> None:
        """See where its answer goes."""
        gear, query = self._gear(request), self.queries[request.arrival.query]
        answer = self._answer(request)
        if job.work.stop_tokens and request.drafted is None:
            self._may_stop(request, job)
        self._note_times(request, job)
        outcome: Outcome = request.stopped or self.ways.judge(gear, request.stage, query)
        self.ways.note(gear, request.stage, query, outcome)
        own = max(1, answer.output_tokens)
        tokens = (request.drafted if request.stopped else None) or own
        wrong, whole = len(request.draft) - request.right, answer.prompt_tokens + own
        request.cost += answer.cost * (answer.prompt_tokens + tokens + wrong) / whole
        if isinstance(outcome, GoUp):
            request.draft = answer.token_ids[:tokens]
            request.stage = outcome.index
            self._queue(request)
        else:
            self._release(request, job, answer, outcome)

    def _note_times(self, request: _Request, job: Job) -> None:
        model, now_s, claimed_s = job.work.model, self.agenda.now_s, job.claimed_s
        engine_s = now_s - claimed_s - request.way_s
        found = StageTimes(model, claimed_s - job.arrived_s, request.way_s, engine_s)
        request.times = (*request.times, found)
        if request.stopped is None:
            prompt, tokens = job.work.prompt_tokens, job.work.output_tokens
            first_s, further_s = job.first_token_s - claimed_s, now_s - job.first_token_s
            self.ways.learn(model, Timing(prompt, first_s, tokens - 1, further_s, request.right))

    def _release(self, request: _Request, job: Job, answer: Answer, outcome: Outcome) -> None:
        now_s, began_s = self.agenda.now_s, request.arrival.at_s
        last = len(self._gear(request).stages) - 1
        is_last = request.stage == last
        shown_s = job.first_token_s if is_last else now_s
        self.left -= 1
        self.answered.append(
            Answered(
                at_s=began_s,
                first_token_s=shown_s - began_s,
                total_s=now_s - began_s,
                quality=answer.quality,
                cost=request.cost,
                stages=len(request.times),
                gear=request.gear,
                times=request.times,
                degraded=outcome.reason if isinstance(outcome, Settle) else None,
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
    hold_tokens: int = 0,
    escalation: EscalationPolicy = _PLAIN,
    slowness: Mapping[str, Sequence[tuple[float, float]]] = _NO_SLOWNESS,
    is_whole: bool = False,
) -> CascadeRun:
    """Replay `arrivals` and return what became of each.

    Without a policy `first_gear` stays in force. Every model of every gear needs a replica, and
    every query an answer of every such model. Of the answers of lower stages `shadow_share` are
    asked of the last one too, unless jobs wait for it. `hold_tokens`: of the
    plan, whose stages are then told token by token. `escalation`: the deployment's. `slowness`: by
    worker (from when, how many times as long computing takes there as its replicas' speeds say), by
    rising times. `is_whole`: clients take answers whole and not token by token. Deterministic.
    """
    world = _World(queries, gears, policy, GearState(first_gear, 0.0), shadow_share=shadow_share)
    speeds = {ModelName(each.model): each.speed for each in reversed(replicas)}
    world.ways = WaysUp(escalation, lambda: world.agenda.now_s, world.oldest_wait_s, speeds)
    world.gather_s, world.is_whole = 0.0 if hold_tokens else GATHER_S, is_whole
    world.left = len(arrivals)
    world.shifts.append((0.0, first_gear))
    cores: dict[str, Cores] = {}
    for replica in replicas:
        shared = cores.setdefault(replica.worker, Cores()) if replica.worker else None
        engine = StepEngine(replica.speed, world.agenda, world.finished, shared, world.may_stop)
        world.seats.setdefault(replica.model, []).append(Seat(replica, engine))
    for arrival in arrivals:
        world.agenda.at(arrival.at_s, partial(world.arrive, arrival))
    for worker, changes in slowness.items():
        world.follow(cores[worker], iter(changes))
    if policy is not None:
        world.agenda.at(0.0, world.sample)
    while world.agenda.step():
        pass
    assert len(world.answered) == len(arrivals), "every request is answered"
    device_s = sum(seat.engine.used_s for seats in world.seats.values() for seat in seats)
    return CascadeRun(tuple(world.answered), tuple(world.shifts), _busy(world), device_s)


def _busy(world: _World) -> Mapping[str, float]:
    end_s = max(world.ended_s, 1e-9)
    used: dict[str, float] = {}
    there: dict[str, int] = {}
    for model, seats in world.seats.items():
        for seat in seats:
            seat.take(0, world.ended_s)
            name = f"{model} on {seat.replica.node}"
            used[name] = used.get(name, 0.0) + seat.busy_s
            there[name] = there.get(name, 0) + seat.replica.slots
    return {name: seconds / (there[name] * end_s) for name, seconds in used.items()}
