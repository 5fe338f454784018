"""One choice's way through the stages of its deployment, as a pure step function.

A stage is *settled* when nothing can overrule it: the last one is, and one that `early` decided on
by the beginning of its answer.

| state      | event                                   | next       | effects                    |
| ---------- | --------------------------------------- | ---------- | -------------------------- |
| undecided  | Piece, `buffer` or `early`              | undecided  | none: it is held           |
| undecided  | Piece, `draft`                          | undecided  | Release, and it is held    |
| undecided  | BeginningDecided, Accept or Settle(why) | settled    | Release of what is held    |
| settled    | Piece                                   | settled    | Release                    |
| settled    | Piece, whole, a lower answer is there   | settled    | none: it is held           |
| undecided  | StageDone, Accept or Settle(why)        | done       | Release, Finish(i, why)    |
| settled    | StageDone, Accept                       | done       | Finish(i, why it settled)  |
| undecided  | StageDone, GoUp(j): its answer is kept  | stage j    | StartStage(j)              |
| undecided  | StageStopped, GoUp(j)                   | stage j    | StartStage(j)              |
| undecided  | StageFailed, GoUp(j)                    | stage j    | StartStage(j)              |
| any        | StageFailed, Settle(why): that of k     | done       | Release, Finish(k, why)    |
| any        | StageFailed, GiveUp                     | done       | Fail                       |

The outcome comes with the event, as `core/certainty/escalation.py` decides it. Before a Release, or
a Finish, of another stage than the one whose text the client has comes Replace(that, this): what
was released up to there is void. Until then a draft stays with the client, also while the stage
above it starts. Only a stage that was undecided when its text was released is ever replaced: in
`draft`. A lower answer is there to be given only as long as no settled stage released anything:
for a client that takes its answer *whole*, and loses nothing by it, that is to the end.
"""

from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from gearfall.core.certainty.escalation import Accept, Degraded, GoUp, Outcome, Settle
from gearfall.core.errors import GearfallError
from gearfall.core.generation.job import FinishReason
from gearfall.core.generation.streaming import StreamMode
from gearfall.core.records import Stage

P = TypeVar("P")


@dataclass(frozen=True, slots=True)
class Draft(Generic[P]):
    """A whole answer of stage `index`, or what is not released yet of one that is settled."""

    index: int
    pieces: tuple[P, ...]
    finish: FinishReason


@dataclass(frozen=True, slots=True)
class CascadeState(Generic[P]):
    """Where a choice is. `held` are the pieces of the current stage while it is undecided."""

    stages: tuple[Stage, ...]
    index: int = 0
    mode: StreamMode = StreamMode.BUFFER
    held: tuple[P, ...] = ()
    draft: Draft[P] | None = None
    """The newest answer that went up; None once a settled stage above it released text."""
    beginning: Accept | Settle | None = None
    """What `early` decided about the current stage; None: not yet, or another mode."""
    is_whole: bool = False
    """The client takes the answer whole: text that comes early is worth nothing to it."""
    visible: int | None = None
    """Stage whose text the client has; None: it has none."""
    is_done: bool = False

    @property
    def stage(self) -> Stage:
        """The stage that runs."""
        return self.stages[self.index]

    @property
    def is_last(self) -> bool:
        """Whether nothing stands above the stage that runs."""
        return self.index == len(self.stages) - 1

    @property
    def is_settled(self) -> bool:
        """Whether nothing can overrule the stage that runs."""
        return self.is_last or self.beginning is not None

    @property
    def is_shown_early(self) -> bool:
        """Whether the client may see text of the running stage before its answer is whole."""
        return not self.is_whole and (self.is_last or self.mode is not StreamMode.BUFFER)


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
class StageStopped:
    """The stage was stopped in the middle of an answer that goes up whatever would follow.

    `certainty` is the most that the answer could have reached or, with `early`, that of the
    beginning which was decided on; `outcome` is what it was stopped for.
    """

    certainty: float
    outcome: GoUp


Verdict = StageDone | StageFailed | StageStopped


@dataclass(frozen=True, slots=True)
class StageEnded:
    """The stage is over, and what becomes of the choice."""

    verdict: Verdict
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class BeginningDecided:
    """The held beginning of the stage's answer is given, and the rest of it will be."""

    outcome: Accept | Settle


@dataclass(frozen=True, slots=True)
class StartStage:
    """Run the prompt on stage `index`."""

    index: int


@dataclass(frozen=True, slots=True)
class Release(Generic[P]):
    """Give these pieces to the client; only a Replace takes them back."""

    pieces: tuple[P, ...]


@dataclass(frozen=True, slots=True)
class Replace:
    """Everything released so far, stage `dropped`'s, is void: the text of stage `index` follows."""

    dropped: int
    index: int


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


Event = Piece[P] | BeginningDecided | StageEnded
Effect = StartStage | Release[P] | Replace | Finish | Fail
Step = tuple[CascadeState[P], tuple[Effect[P], ...]]


def step(state: CascadeState[P], event: Event[P]) -> Step[P]:
    """Return the next state and what to do."""
    assert not state.is_done, "a cascade that is done takes no event"
    if isinstance(event, Piece):
        return _on_piece(state, event.piece)
    if isinstance(event, BeginningDecided):
        return _on_beginning(state, event.outcome)
    verdict, outcome = event.verdict, event.outcome
    if isinstance(outcome, GoUp):
        return _go_up(state, verdict, outcome.index)
    if isinstance(verdict, StageDone):
        assert isinstance(outcome, Accept | Settle), "an answer is given or goes up"
        given = state.beginning or outcome
        own = Draft(state.index, state.held, verdict.finish)
        return _give(state, own, given.reason if isinstance(given, Settle) else None)
    assert isinstance(verdict, StageFailed), "a stage is stopped to go up"
    if isinstance(outcome, Settle):
        assert state.draft is not None, "only an answer that there is can be given"
        return _give(state, state.draft, outcome.reason)
    return _ended(state), (Fail(verdict.error),)


def _on_piece(state: CascadeState[P], piece: P) -> Step[P]:
    keeps_lower = state.is_whole and state.draft is not None
    if state.is_settled and not keeps_lower:
        return _release(replace(state, draft=None), (piece,))
    held = replace(state, held=(*state.held, piece))
    is_shown = state.mode is StreamMode.DRAFT and not keeps_lower
    return _release(held, (piece,)) if is_shown else (held, ())


def _on_beginning(state: CascadeState[P], outcome: Accept | Settle) -> Step[P]:
    assert state.mode is StreamMode.EARLY, "other modes decide on whole answers"
    assert not state.is_settled, "a stage is decided once"
    settled = replace(state, beginning=outcome, held=(), draft=None)
    return _release(settled, state.held) if state.held else (settled, ())


def _release(state: CascadeState[P], pieces: tuple[P, ...]) -> Step[P]:
    """Give pieces of the current stage, in place of what the client has of another."""
    replaces = _replaces(state, state.index)
    return replace(state, visible=state.index), (*replaces, Release(pieces))


def _replaces(state: CascadeState[P], index: int) -> tuple[Replace, ...]:
    if state.visible is None or state.visible == index:
        return ()
    return (Replace(state.visible, index),)


def _give(state: CascadeState[P], answer: Draft[P], degraded: Degraded | None) -> Step[P]:
    """End with an answer, all of whose pieces the client has if it has any of them."""
    is_missing = state.visible != answer.index and answer.pieces
    release: tuple[Effect[P], ...] = (Release(answer.pieces),) if is_missing else ()
    finish = Finish(answer.finish, answer.index, degraded)
    return _ended(state), (*_replaces(state, answer.index), *release, finish)


def _go_up(state: CascadeState[P], verdict: Verdict, to: int) -> Step[P]:
    assert state.index < to < len(state.stages), "up is a stage above"
    assert not state.is_settled, "what is settled stays"
    draft = state.draft
    if isinstance(verdict, StageDone):
        draft = Draft(state.index, state.held, verdict.finish)
    return replace(state, index=to, held=(), draft=draft), (StartStage(to),)


def _ended(state: CascadeState[P]) -> CascadeState[P]:
    return replace(state, held=(), draft=None, is_done=True)


def cost_flops(parameters: int, tokens: int) -> float:
    """Arithmetic of a forward pass over `tokens` tokens: two operations a parameter and token."""
    return 2.0 * parameters * tokens
