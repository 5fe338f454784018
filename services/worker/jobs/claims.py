"""Claims: queue entries a worker has taken, each until it is acknowledged; and jobs it was moved.

    state      event         next       effects
    unsettled  connected     running    send claim, submit
    unsettled  router gone   -          acknowledge
    unsettled  stop          -          acknowledge
    running    final run     finishing
    running    stop          -          cancel, acknowledge
    running    broken        unsettled  cancel
    running    engine died   lost       send lost
    running    give back     lost       cancel, send lost
    running    router gone   -          cancel, acknowledge
    finishing  finished      -          acknowledge
    finishing  stop          -          acknowledge
    finishing  broken        unsettled
    finishing  router gone   -          acknowledge
    lost       stop          -          acknowledge
    lost       broken        unsettled
    lost       router gone   -          acknowledge
    held       granted       running    push held back
    held       drop          -          cancel
    held       stop          -          cancel
    held       broken        -          cancel
    held       router gone   -          cancel
    held       give back     -          cancel
    held       engine died   -

A claim starts unsettled, or held when a migration brings the job; every pair that is not listed
changes nothing. No row that keeps a claim acknowledges its entry, and every row that drops one
does. A held one has no entry, nor has it later, when it was granted.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum

from gearfall.core.generation.job import Job, Priority, TokenRun
from gearfall.core.ids import Epoch, JobId, ModelName
from gearfall.core.ports import QueuedJob


class ClaimState(Enum):
    """Where a claimed job stands between engine and router."""

    __hash__ = object.__hash__  # members are one object each; Enum's own is Python and hashes names

    UNSETTLED = "unsettled"
    """Its router has not been told, or the stream to it broke."""
    RUNNING = "running"
    FINISHING = "finishing"
    """Its final run was pushed; the router has not confirmed it."""
    LOST = "lost"
    """The router was told that it no longer runs here."""
    HELD = "held"
    """Another worker owns the job; this one is about to take it over."""


class ClaimEvent(Enum):
    """What happens to a claim."""

    __hash__ = object.__hash__

    CONNECTED = "connected"
    """The push stream to its router is open and the router is the one it belongs to."""
    BROKEN = "broken"
    """The push stream broke."""
    ROUTER_GONE = "router gone"
    FINAL_RUN = "final run"
    FINISHED = "finished"
    STOP = "stop"
    ENGINE_DIED = "engine died"
    GIVE_BACK = "give back"
    GRANTED = "granted"
    """The router made this worker the owner."""
    DROP = "drop"
    """The migration that brought the job ended without a grant."""


class Effect(Enum):
    """What the host does about it, in the order given."""

    SEND_CLAIM = "send claim"
    SEND_LOST = "send lost"
    SUBMIT = "submit"
    CANCEL = "cancel"
    ACKNOWLEDGE = "acknowledge"
    PUSH_HELD_BACK = "push held back"


_S, _E, _F = ClaimState, ClaimEvent, Effect

TRANSITIONS: dict[tuple[ClaimState, ClaimEvent], tuple[ClaimState | None, tuple[Effect, ...]]] = {
    (_S.UNSETTLED, _E.CONNECTED): (_S.RUNNING, (_F.SEND_CLAIM, _F.SUBMIT)),
    (_S.UNSETTLED, _E.ROUTER_GONE): (None, (_F.ACKNOWLEDGE,)),
    (_S.UNSETTLED, _E.STOP): (None, (_F.ACKNOWLEDGE,)),
    (_S.RUNNING, _E.FINAL_RUN): (_S.FINISHING, ()),
    (_S.RUNNING, _E.STOP): (None, (_F.CANCEL, _F.ACKNOWLEDGE)),
    (_S.RUNNING, _E.BROKEN): (_S.UNSETTLED, (_F.CANCEL,)),
    (_S.RUNNING, _E.ENGINE_DIED): (_S.LOST, (_F.SEND_LOST,)),
    (_S.RUNNING, _E.GIVE_BACK): (_S.LOST, (_F.CANCEL, _F.SEND_LOST)),
    (_S.RUNNING, _E.ROUTER_GONE): (None, (_F.CANCEL, _F.ACKNOWLEDGE)),
    (_S.FINISHING, _E.FINISHED): (None, (_F.ACKNOWLEDGE,)),
    (_S.FINISHING, _E.STOP): (None, (_F.ACKNOWLEDGE,)),
    (_S.FINISHING, _E.BROKEN): (_S.UNSETTLED, ()),
    (_S.FINISHING, _E.ROUTER_GONE): (None, (_F.ACKNOWLEDGE,)),
    (_S.LOST, _E.STOP): (None, (_F.ACKNOWLEDGE,)),
    (_S.LOST, _E.BROKEN): (_S.UNSETTLED, ()),
    (_S.LOST, _E.ROUTER_GONE): (None, (_F.ACKNOWLEDGE,)),
    (_S.HELD, _E.GRANTED): (_S.RUNNING, (_F.PUSH_HELD_BACK,)),
    (_S.HELD, _E.DROP): (None, (_F.CANCEL,)),
    (_S.HELD, _E.STOP): (None, (_F.CANCEL,)),
    (_S.HELD, _E.BROKEN): (None, (_F.CANCEL,)),
    (_S.HELD, _E.ROUTER_GONE): (None, (_F.CANCEL,)),
    (_S.HELD, _E.GIVE_BACK): (None, (_F.CANCEL,)),
    (_S.HELD, _E.ENGINE_DIED): (None, ()),
}
"""(state, event) -> (next state or None for "dropped", effects)."""

OCCUPYING = frozenset({ClaimState.UNSETTLED, ClaimState.RUNNING, ClaimState.HELD})
"""States in which a claim takes one of its replica's slots, now or as soon as it may run."""

ClaimKey = tuple[JobId, Epoch]


@dataclass(slots=True)
class Claim:
    """One claimed (job, epoch) and the queue entries that carried it; none if it was moved here."""

    job: Job
    entry_ids: list[str]
    state: ClaimState = ClaimState.UNSETTLED
    next_index: int = 0
    """Index of the token that follows what was pushed since the last submission."""
    token_ids: list[int] = field(default_factory=list)
    """The answer so far: what the job came with and what was pushed since."""
    is_moved: bool = False
    """A migration brought it, no queue entry."""
    is_released: bool = False
    """While held: the engine runs it, and what it brings is held back."""
    held_back: list[TokenRun] = field(default_factory=list)

    @property
    def key(self) -> ClaimKey:
        """(job_id, epoch)."""
        return (self.job.job_id, self.job.epoch)


@dataclass(frozen=True, slots=True)
class Todo:
    """One effect on one claim, to be performed now."""

    effect: Effect
    job: Job
    entry_ids: tuple[str, ...]


@dataclass(slots=True)
class ClaimBook:
    """Owner of all claims of one worker."""

    _claims: dict[ClaimKey, Claim] = field(default_factory=dict)
    _occupied: dict[ModelName, int] = field(default_factory=dict)

    def add(self, queued: QueuedJob) -> bool:
        """Note a claimed entry; False when its (job, epoch) is here already (a redelivery)."""
        key = (queued.job.job_id, queued.job.epoch)
        if known := self._claims.get(key):
            if queued.entry_id not in known.entry_ids:
                known.entry_ids.append(queued.entry_id)
            return False
        self._claims[key] = Claim(queued.job, [queued.entry_id])
        self._occupy(queued.job.model, 1)
        return True

    def hold(self, job: Job) -> bool:
        """Note a job that another worker owns; False when its (job, epoch) is here already."""
        key = (job.job_id, job.epoch)
        if key in self._claims:
            return False
        self._claims[key] = Claim(job, [], ClaimState.HELD, is_moved=True)
        self._occupy(job.model, 1)
        return True

    def release(self, key: ClaimKey, token_ids: Sequence[int]) -> None:
        """Hold back what the engine brings of a held job behind the answer's `token_ids`."""
        claim = self._claims[key]
        assert claim.state is ClaimState.HELD
        claim.is_released, claim.next_index = True, len(token_ids)
        claim.token_ids = list(token_ids)

    def apply(self, key: ClaimKey, event: ClaimEvent) -> tuple[Todo, ...]:
        """Step one claim by the table and return what is to be done; nothing if it is not here."""
        claim = self._claims.get(key)
        row = TRANSITIONS.get((claim.state, event)) if claim else None
        if claim is None or row is None:
            return ()
        state, effects = row
        was_occupying = claim.state in OCCUPYING
        if state is None:
            del self._claims[key]
        else:
            claim.state = state
        if event is ClaimEvent.CONNECTED:
            claim.next_index = len(claim.job.generated_token_ids)
            claim.token_ids = list(claim.job.generated_token_ids)
        self._occupy(claim.job.model, (state in OCCUPYING) - was_occupying)
        return tuple(Todo(effect, claim.job, tuple(claim.entry_ids)) for effect in effects)

    def take(self, run: TokenRun) -> tuple[Claim, TokenRun] | None:
        """Return the claim that `run` continues and what is new in it; None when it is dropped.

        Dropped are tokens of jobs that do not run here any more, and what an engine still said
        about an earlier submission of the same (job, epoch); where that was taken, what the next
        one says of it again. Those of a held claim are kept on it.
        """
        claim = self._claims.get((run.job_id, run.epoch))
        if claim is None or run.index > claim.next_index:
            return None
        is_held_back = claim.state is ClaimState.HELD and claim.is_released
        if claim.state is not ClaimState.RUNNING and not is_held_back:
            return None
        if run.index < claim.next_index:
            new = max(0, run.index + len(run.token_ids) - claim.next_index)
            if not new and run.finish is None:
                return None
            run = run.tail(new)
        claim.next_index += len(run.token_ids)
        claim.token_ids.extend(run.token_ids)
        if is_held_back:
            claim.held_back.append(run)
            return None
        return claim, run

    def get(self, key: ClaimKey) -> Claim | None:
        """Return the claim of (job, epoch), if it is here."""
        return self._claims.get(key)

    def occupied_slots(self, model: ModelName) -> int:
        """How many slots of the model's replica are taken."""
        return self._occupied.get(model, 0)

    def displaceable_slots(self, model: ModelName) -> int:
        """How many of them are taken by jobs that give way to interactive ones."""
        return sum(
            claim.state in OCCUPYING
            and claim.state is not ClaimState.HELD
            and claim.job.priority is Priority.BATCH
            for claim in self.of_model(model)
        )

    def of_address(self, router_address: str) -> tuple[Claim, ...]:
        """Claims whose token log is behind one router address, oldest first."""
        return tuple(c for c in self._claims.values() if c.job.router_address == router_address)

    def of_model(self, model: ModelName) -> tuple[Claim, ...]:
        """Claims of one model, oldest first."""
        return tuple(c for c in self._claims.values() if c.job.model == model)

    def __iter__(self) -> Iterator[Claim]:
        return iter(tuple(self._claims.values()))

    def __len__(self) -> int:
        return len(self._claims)

    def _occupy(self, model: ModelName, change: int) -> None:
        self._occupied[model] = self._occupied.get(model, 0) + change

    def check(self) -> None:
        """Assert that the slot counts are those of the claims."""
        counts: dict[ModelName, int] = {}
        for key, claim in self._claims.items():
            assert key == claim.key
            assert claim.entry_ids or claim.is_moved
            assert claim.is_released or not claim.held_back
            model = claim.job.model
            counts[model] = counts.get(model, 0) + (claim.state in OCCUPYING)
        assert counts == {m: n for m, n in self._occupied.items() if m in counts}
        assert all(n == 0 for m, n in self._occupied.items() if m not in counts)
