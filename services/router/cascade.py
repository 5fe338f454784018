"""One choice's way through the stages of its deployment, as a pure step function.

| state     | event                                     | next          | effects                  |
| --------- | ----------------------------------------- | ------------- | ------------------------ |
| stage i   | Piece, stage i is not the last            | stage i       | none: it is held         |
| stage i   | Piece, stage i is the last                | stage i       | Release                  |
| stage i   | StageDone, Accept                         | done          | Release, Finish(i)       |
| stage i   | StageDone, Settle(reason)                 | done          | Release, Finish(i, why)  |
| stage i   | StageDone, GoUp(j): its answer is kept    | stage j       | StartStage(j)            |
| stage i   | StageFailed, GoUp(j)                      | stage j       | StartStage(j)            |
| stage i   | StageFailed, Settle(reason): that of k    | done          | Release, Finish(k, why)  |
| stage i   | StageFailed, GiveUp                       | done          | Fail                     |

The outcome comes with the event, as `gearfall/core/escalation.py` decides it. What was released is
never taken back: a stage that can be overruled releases nothing before it is decided, and a lower
answer is there to be given only as long as nothing above it was released.
"""

from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from gearfall.core.errors import GearfallError
from gearfall.core.escalation import Accept, Degraded, GoUp, Outcome, Settle
from gearfall.core.job import FinishReason
from gearfall.core.records import Stage

P = TypeVar("P")


@dataclass(frozen=True, slots=True)
class Draft(Generic[P]):
    """A whole answer of stage `index` that was too uncertain to be given at once."""

    index: int
    pieces: tuple[P, ...]
    finish: FinishReason


@dataclass(frozen=True, slots=True)
class CascadeState(Generic[P]):
    """Where a choice is. `held` are the current stage's pieces that are not released yet."""

    stages: tuple[Stage, ...]
    index: int = 0
    held: tuple[P, ...] = ()
    draft: Draft[P] | None = None
    """The newest answer that went up; None once a stage above it released text."""
    is_done: bool = False

    @property
    def stage(self) -> Stage:
        """The stage that runs."""
        return self.stages[self.index]

    @property
    def is_last(self) -> bool:
        """Whether nothing stands above the stage that runs."""
        return self.index == len(self.stages) - 1


@dataclass(frozen=True, slots=True)
class Piece(Generic[P]):
    """The stage produced a piece of its answer."""

    piece: P


@dataclass(frozen=True, slots=True)
class StageDone:
    """The stage's answer is whole; `certainty` in 0 to 1."""

    finish: FinishReason
    certainty: float


@dataclass(frozen=True, slots=True)
class StageFailed:
    """The stage can't answer: its model does not start, or the engine refused the job."""

    error: GearfallError


@dataclass(frozen=True, slots=True)
class StageEnded:
    """The stage is over, and what becomes of the choice."""

    verdict: StageDone | StageFailed
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class StartStage:
    """Run the prompt on stage `index`."""

    index: int


@dataclass(frozen=True, slots=True)
class Release(Generic[P]):
    """Give these pieces to the client; they will never be taken back."""

    pieces: tuple[P, ...]


@dataclass(frozen=True, slots=True)
class Finish:
    """The choice ends with the answer of stage `index`."""

    finish: FinishReason
    index: int = 0
    degraded: Degraded | None = None
    """Why it is one that would have gone up; None for an answer as the cascade means it."""


@dataclass(frozen=True, slots=True)
class Fail:
    """The choice ends with an error."""

    error: GearfallError


Event = Piece[P] | StageEnded
Effect = StartStage | Release[P] | Finish | Fail
Step = tuple[CascadeState[P], tuple[Effect[P], ...]]


def step(state: CascadeState[P], event: Event[P]) -> Step[P]:
    """Return the next state and what to do."""
    assert not state.is_done, "a cascade that is done takes no event"
    if isinstance(event, Piece):
        return _on_piece(state, event.piece)
    verdict, outcome = event.verdict, event.outcome
    if isinstance(outcome, GoUp):
        return _go_up(state, verdict, outcome.index)
    if isinstance(verdict, StageDone):
        assert isinstance(outcome, Accept | Settle), "an answer is given or goes up"
        own = Draft(state.index, state.held, verdict.finish)
        return _give(state, own, outcome.reason if isinstance(outcome, Settle) else None)
    if isinstance(outcome, Settle):
        assert state.draft is not None, "only an answer that there is can be given"
        return _give(state, state.draft, outcome.reason)
    return _ended(state), (Fail(verdict.error),)


def _on_piece(state: CascadeState[P], piece: P) -> Step[P]:
    if state.is_last:
        return replace(state, draft=None), (Release((piece,)),)
    return replace(state, held=(*state.held, piece)), ()


def _give(state: CascadeState[P], answer: Draft[P], degraded: Degraded | None) -> Step[P]:
    release: tuple[Effect[P], ...] = (Release(answer.pieces),) if answer.pieces else ()
    return _ended(state), (*release, Finish(answer.finish, answer.index, degraded))


def _go_up(state: CascadeState[P], verdict: StageDone | StageFailed, to: int) -> Step[P]:
    assert state.index < to < len(state.stages), "up is a stage above"
    draft = state.draft
    if isinstance(verdict, StageDone):
        draft = Draft(state.index, state.held, verdict.finish)
    return replace(state, index=to, held=(), draft=draft), (StartStage(to),)


def _ended(state: CascadeState[P]) -> CascadeState[P]:
    return replace(state, held=(), draft=None, is_done=True)


def cost_flops(parameters: int, tokens: int) -> float:
    """Arithmetic of a forward pass over `tokens` tokens: two operations a parameter and token."""
    return 2.0 * parameters * tokens
