"""A job's token log: the one place that decides who may append which token.

| state    | event                                    | next     | verdict                        |
| -------- | ---------------------------------------- | -------- | ------------------------------ |
| WAITING  | claim, current epoch                     | OWNED    | Bound                          |
| OWNED    | claim, current epoch, by the owner       | OWNED    | Bound                          |
| any      | claim, else                              | same     | Refused                        |
| OWNED    | run of the owner at the next index       | OWNED    | Appended                       |
| OWNED    | run of the owner, known tokens only      | OWNED    | Duplicate                      |
| OWNED    | run of the owner, gap or other tokens    | OWNED    | Broken: put the job back       |
| OWNED    | run of the owner with `finish`           | FINISHED | Appended                       |
| FINISHED | run of the last owner, known tokens only | FINISHED | Duplicate                      |
| any      | run, else                                | same     | Refused                        |
| WAITING  | reissue (queue lost the entry)           | WAITING  | epoch + 1                      |
| OWNED    | lose (owner died or gave up)             | WAITING  | epoch + 1, or poisoned         |
| OWNED    | hand over by the owner at the next index | OWNED    | HandedOver: target, epoch + 1  |
| OWNED    | hand over by the owner at another index  | OWNED    | Kept                           |
| any      | hand over, else                          | same     | Refused                        |
| any      | close (client gone, stop string)         | FINISHED |                                |

A worker may append while it holds (worker, epoch): promise 1 of the design. An owner that leaves a
gap is broken, not trusted: its caller loses it. Five owners in a row that brought no token poison
the job: it kills engines.
"""

from dataclasses import dataclass
from enum import Enum

from gearfall.core.generation.job import TokenRun
from gearfall.core.ids import Epoch, JobId, WorkerId

MAX_BARREN_EPOCHS = 5
"""Owners in a row that may die without one new token before the job ends with an error."""


class LogState(Enum):
    """Life of a token log."""

    WAITING = "waiting"
    OWNED = "owned"
    FINISHED = "finished"


@dataclass(frozen=True, slots=True)
class Bound:
    """The worker is the owner now."""


@dataclass(frozen=True, slots=True)
class Appended:
    """The tokens of `run` that are new, at the next index; `finish` is kept on it."""

    run: TokenRun


@dataclass(frozen=True, slots=True)
class Duplicate:
    """Nothing new came; nothing is wrong."""


@dataclass(frozen=True, slots=True)
class Refused:
    """Not the current owner or epoch: the sender must stop."""

    reason: str


@dataclass(frozen=True, slots=True)
class Broken:
    """The owner contradicts the log: it must stop, and the caller must lose it."""

    reason: str


@dataclass(frozen=True, slots=True)
class HandedOver:
    """The target is the owner now, under this epoch; whoever was it must stop."""

    epoch: Epoch


@dataclass(frozen=True, slots=True)
class Kept:
    """The owner is the owner as before."""

    reason: str


class TokenLog:
    """Tokens of one job in order, with the epoch and owner that may append. Mutable; no I/O."""

    __slots__ = (
        "_barren_epochs",
        "_last_owner",
        "_tokens_at_epoch",
        "epoch",
        "job_id",
        "logprobs",
        "margins",
        "owner",
        "owners",
        "state",
        "token_ids",
    )

    def __init__(self, job_id: JobId) -> None:
        self.job_id = job_id
        self.state = LogState.WAITING
        self.epoch = Epoch(1)
        self.owner: WorkerId | None = None
        self.owners = 0
        """How many times a worker was bound."""
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.margins: list[float] = []
        self._last_owner: WorkerId | None = None
        self._tokens_at_epoch = 0
        self._barren_epochs = 0

    @property
    def is_poisoned(self) -> bool:
        """Whether too many owners in a row died without a token."""
        return self._barren_epochs >= MAX_BARREN_EPOCHS

    def claim(self, worker: WorkerId, epoch: Epoch) -> Bound | Refused:
        """Bind (worker, epoch) to the job."""
        if epoch != self.epoch:
            return Refused(f"epoch {epoch} is not the current epoch {self.epoch}")
        if self.state is LogState.FINISHED:
            return Refused("the job is finished")
        if self.state is LogState.OWNED:
            return Bound() if worker == self.owner else Refused(f"owned by {self.owner}")
        self.state = LogState.OWNED
        self.owner = worker
        self.owners += 1
        return Bound()

    def append(self, worker: WorkerId, run: TokenRun) -> Appended | Duplicate | Refused | Broken:
        """Take what is new in `run`; finish the log when the run says so."""
        if run.epoch != self.epoch:
            return Refused(f"epoch {run.epoch} is not the current epoch {self.epoch}")
        if self.state is LogState.FINISHED:
            is_known = worker == self._last_owner and self._new_of(run) == ()
            return Duplicate() if is_known else Refused("the job is finished")
        if self.state is not LogState.OWNED or worker != self.owner:
            return Refused("not the owner")
        new = self._new_of(run)
        if new is None:
            return Broken(f"run at {run.index} does not continue the log at {len(self.token_ids)}")
        if not new and run.finish is None:
            return Duplicate()
        return self._take(run, len(new))

    def reissue(self) -> Epoch:
        """Start a new epoch for a job that nobody owns and whose queue entry is gone."""
        assert self.state is LogState.WAITING, self.state
        self._next_epoch()
        return self.epoch

    def lose(self) -> Epoch:
        """The owner is gone: fence it by a new epoch. Look at `is_poisoned` before going on."""
        assert self.state is LogState.OWNED, self.state
        is_barren = len(self.token_ids) == self._tokens_at_epoch
        self._barren_epochs = self._barren_epochs + 1 if is_barren else 0
        self.state = LogState.WAITING
        self.owner = None
        self._next_epoch()
        return self.epoch

    def hand_over(
        self, worker: WorkerId, epoch: Epoch, next_index: int, target: WorkerId
    ) -> HandedOver | Kept | Refused:
        """Make `target` the owner in place of `worker`, which stopped before `next_index`."""
        if epoch != self.epoch:
            return Refused(f"epoch {epoch} is not the current epoch {self.epoch}")
        if self.state is not LogState.OWNED or worker != self.owner:
            return Refused("not the owner")
        if next_index != len(self.token_ids):
            return Kept(f"the log ends at {len(self.token_ids)}, not at {next_index}")
        if len(self.token_ids) > self._tokens_at_epoch:
            self._barren_epochs = 0
        self.owner = target
        self.owners += 1
        self._next_epoch()
        return HandedOver(self.epoch)

    def close(self) -> None:
        """End the log without a final run. Idempotent."""
        if self.state is not LogState.FINISHED:
            self._last_owner = self.owner
            self.owner = None
            self.state = LogState.FINISHED

    def check(self) -> None:
        """Assert the invariant."""
        assert (self.owner is not None) == (self.state is LogState.OWNED)
        assert len(self.token_ids) == len(self.logprobs) == len(self.margins)
        assert 0 <= self._tokens_at_epoch <= len(self.token_ids)
        assert self.epoch >= 1

    def _next_epoch(self) -> None:
        self.epoch = Epoch(self.epoch + 1)
        self._tokens_at_epoch = len(self.token_ids)

    def _new_of(self, run: TokenRun) -> tuple[int, ...] | None:
        """Tokens behind the log's end; None for a gap or for other tokens than the log has."""
        known = len(self.token_ids) - run.index
        if known < 0:
            return None
        if known == 0:
            return run.token_ids
        overlap = run.token_ids[:known]
        if list(overlap) != self.token_ids[run.index : run.index + len(overlap)]:
            return None
        return run.token_ids[known:]

    def _take(self, run: TokenRun, new_count: int) -> Appended:
        if new_count != len(run.token_ids):
            run = run.tail(new_count)
        self.token_ids.extend(run.token_ids)
        self.logprobs.extend(run.logprobs)
        self.margins.extend(run.margins)
        if run.finish is not None:
            self.close()
        return Appended(run)
