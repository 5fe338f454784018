"""One choice's way through the stages of its deployment, as a pure step function.

| state     | event                                     | next          | effects                |
| --------- | ----------------------------------------- | ------------- | ---------------------- |
| stage i   | Piece, stage i is not the last            | stage i       | none: it is held       |
| stage i   | Piece, stage i is the last                | stage i       | Release                |
| stage i   | StageDone, certain enough or the last     | done          | Release, Finish        |
| stage i   | StageDone, below the threshold            | stage i + 1   | StartStage(i + 1)      |
| stage i   | StageFailed, stage i is not the last      | stage i + 1   | StartStage(i + 1)      |
| stage i   | StageFailed, stage i is the last          | done          | Fail                   |

What was released is never taken back: a stage that can be overruled releases nothing before it is
decided.
"""

from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from gearfall.core.errors import GearfallError
from gearfall.core.job import FinishReason
from gearfall.core.records import Stage

P = TypeVar("P")


@dataclass(frozen=True, slots=True)
class CascadeState(Generic[P]):
    """Where a choice is. `held` are the current stage's pieces that are not released yet."""

    stages: tuple[Stage, ...]
    index: int = 0
    held: tuple[P, ...] = ()
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
class StartStage:
    """Run the prompt on stage `index`."""

    index: int


@dataclass(frozen=True, slots=True)
class Release(Generic[P]):
    """Give these pieces to the client; they will never be taken back."""

    pieces: tuple[P, ...]


@dataclass(frozen=True, slots=True)
class Finish:
    """The choice ends with the current stage's answer."""

    finish: FinishReason


@dataclass(frozen=True, slots=True)
class Fail:
    """The choice ends with an error."""

    error: GearfallError


Event = Piece[P] | StageDone | StageFailed
Effect = StartStage | Release[P] | Finish | Fail
Step = tuple[CascadeState[P], tuple[Effect[P], ...]]


def step(state: CascadeState[P], event: Event[P]) -> Step[P]:
    """Return the next state and what to do."""
    assert not state.is_done, "a cascade that is done takes no event"
    if isinstance(event, Piece):
        return _on_piece(state, event.piece)
    if isinstance(event, StageDone):
        return _on_done(state, event)
    return _go_up(state) if not state.is_last else (_ended(state), (Fail(event.error),))


def _on_piece(state: CascadeState[P], piece: P) -> Step[P]:
    if state.is_last:
        return state, (Release((piece,)),)
    return replace(state, held=(*state.held, piece)), ()


def _on_done(state: CascadeState[P], event: StageDone) -> Step[P]:
    threshold = state.stage.threshold
    if not state.is_last and threshold is not None and event.certainty < threshold:
        return _go_up(state)
    release: tuple[Effect[P], ...] = (Release(state.held),) if state.held else ()
    return _ended(state), (*release, Finish(event.finish))


def _go_up(state: CascadeState[P]) -> Step[P]:
    following = state.index + 1
    return replace(state, index=following, held=()), (StartStage(following),)


def _ended(state: CascadeState[P]) -> CascadeState[P]:
    return replace(state, held=(), is_done=True)


def cost_flops(parameters: int, tokens: int) -> float:
    """Arithmetic of a forward pass over `tokens` tokens: two operations a parameter and token."""
    return 2.0 * parameters * tokens
