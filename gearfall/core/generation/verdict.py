"""Judges the histories of a run: promises 1 to 3 of the design, and that nothing was left behind.

What is looked at, and where a breach is counted:

    one owner at a time, epochs only upwards, tokens from the owner alone        breaches
    the next index always                                                        lost, repeated
    equal requests give equal tokens, in the log and at the client               changed, lost
    every accepted job ends once, unless its router died with it                 breaches
    no process holds slots, blocks or leases, and none outlives its parent       breaches
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from gearfall.core.generation.history import (
    Accepted,
    Answered,
    AnyEvent,
    Appended,
    Bound,
    Claimed,
    Ended,
    HandedOver,
    Held,
    Holding,
    Lost,
    ProcessHistory,
)
from gearfall.core.ids import Epoch, JobId, WorkerId

WHOLE = frozenset({"stop", "length"})
"""Reasons of an end after which nothing of the answer is missing."""
FIRST_EPOCH = Epoch(1)
STANDING = frozenset({"leases"})
"""Held for as long as a replica stands, and so only judged when all has stopped."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a run kept and what it broke."""

    jobs: int
    """Accepted by a router."""
    abandoned: int
    """Of these, ended with their router's process."""
    moves: int
    """Handovers from worker to worker."""
    resumes: int
    """Times a job was put back after its owner was gone."""
    tokens: int
    """In all logs together."""
    lost: int
    """Tokens that are missing in a log or an answer."""
    repeated: int
    """Tokens that came twice."""
    changed: int
    """Tokens that differ from those of an equal request."""
    breaches: tuple[str, ...]

    @property
    def is_sound(self) -> bool:
        """Whether nothing was broken."""
        return not (self.lost or self.repeated or self.changed or self.breaches)


@dataclass(slots=True)
class _Log:
    """One job as its router wrote it down."""

    digest: str
    epoch: Epoch = FIRST_EPOCH
    owner: WorkerId | None = None
    token_ids: list[int] = field(default_factory=list)
    end: str = ""


@dataclass(slots=True)
class _Counts:
    moves: int = 0
    resumes: int = 0
    lost: int = 0
    repeated: int = 0
    changed: int = 0
    abandoned: int = 0
    breaches: list[str] = field(default_factory=list)


def judge(
    histories: Sequence[ProcessHistory],
    alive: frozenset[int] = frozenset(),
    *,
    is_stopped: bool = True,
) -> Verdict:
    """Return the verdict on a run.

    `alive`: ids of processes of the histories that still run; none should when `is_stopped`.
    """
    counts = _Counts()
    logs: dict[JobId, _Log] = {}
    for history in histories:
        own: dict[JobId, _Log] = {}
        for event in history.events:
            _follow(event, own, counts)
        _judge_ends(history, own, counts, is_alive=history.start.pid in alive)
        logs |= own
    _compare(_answers_of_logs(logs), counts)
    _compare(_answers_of_clients(histories), counts)
    _judge_claims(histories, logs, counts)
    _judge_left(histories, alive, counts, is_stopped=is_stopped)
    return Verdict(
        jobs=len(logs),
        abandoned=counts.abandoned,
        moves=counts.moves,
        resumes=counts.resumes,
        tokens=sum(len(log.token_ids) for log in logs.values()),
        lost=counts.lost,
        repeated=counts.repeated,
        changed=counts.changed,
        breaches=tuple(counts.breaches),
    )


def _follow(event: AnyEvent, logs: dict[JobId, _Log], counts: _Counts) -> None:
    """Step the job's log by one event of its router."""
    if isinstance(event, Accepted):
        if event.job_id in logs:
            counts.breaches.append(f"{event.job_id} was accepted twice")
        logs[event.job_id] = _Log(event.digest)
        return
    if not isinstance(event, Bound | Appended | HandedOver | Lost | Ended):
        return
    log = logs.get(event.job_id)
    if log is None:
        counts.breaches.append(f"{event} of a job that was never accepted")
    elif log.end:
        counts.breaches.append(f"{event} after the job's end")
    elif (breach := _step(log, event, counts)) is not None:
        counts.breaches.append(f"{breach}: {event}")


def _step(
    log: _Log, event: Bound | Appended | HandedOver | Lost | Ended, counts: _Counts
) -> str | None:
    """Apply an event to its log; return what it breaks."""
    match event:
        case Bound(_, epoch, worker):
            breach = None if log.owner is None and epoch == log.epoch else "a second owner"
            log.owner = worker
        case HandedOver(_, epoch, source, target):
            is_due = source == log.owner != target and epoch == log.epoch + 1
            breach = None if is_due else "a handover by another than the owner"
            log.owner, log.epoch = target, epoch
            counts.moves += 1
        case Lost(_, epoch):
            breach = None if epoch == log.epoch + 1 else "an epoch that is not the next"
            counts.resumes += log.owner is not None
            log.owner, log.epoch = None, epoch
        case Appended(_, epoch, worker, index, token_ids):
            is_owner = worker == log.owner and epoch == log.epoch
            breach = None if is_owner else "tokens of another than the owner"
            counts.lost += max(0, index - len(log.token_ids))
            counts.repeated += max(0, min(len(log.token_ids) - index, len(token_ids)))
            log.token_ids.extend(token_ids)
        case Ended(_, reason):
            breach, log.end = None, reason
    return breach


def _judge_ends(
    history: ProcessHistory, logs: dict[JobId, _Log], counts: _Counts, *, is_alive: bool
) -> None:
    """Every job ended, except where the router died with it."""
    open_jobs = [job_id for job_id, log in logs.items() if not log.end]
    if is_alive or history.has_ended:
        counts.breaches += [f"{job_id} never ended" for job_id in open_jobs]
    else:
        counts.abandoned += len(open_jobs)


@dataclass(frozen=True, slots=True)
class _Answer:
    name: str
    token_ids: Sequence[int]
    is_whole: bool


def _answers_of_logs(logs: dict[JobId, _Log]) -> Iterator[_Answer]:
    for log in logs.values():
        yield _Answer(log.digest, log.token_ids, log.end in WHOLE)


def _answers_of_clients(histories: Sequence[ProcessHistory]) -> Iterator[_Answer]:
    for history in histories:
        for event in history.events:
            if isinstance(event, Answered):
                yield _Answer(event.name, event.token_ids, event.is_whole)


def _compare(answers: Iterable[_Answer], counts: _Counts) -> None:
    """Hold answers of one name against the first whole one: others are it, or its beginning."""
    by_name: defaultdict[str, list[_Answer]] = defaultdict(list)
    for answer in answers:
        by_name[answer.name].append(answer)
    for same in by_name.values():
        whole = next((answer for answer in same if answer.is_whole), None)
        longest = max(same, key=lambda answer: len(answer.token_ids))
        reference = (whole or longest).token_ids
        for answer in same:
            got = answer.token_ids
            counts.changed += sum(a != b for a, b in zip(got, reference, strict=False))
            counts.repeated += max(0, len(got) - len(reference))
            if answer.is_whole:
                counts.lost += max(0, len(reference) - len(got))


def _judge_claims(
    histories: Sequence[ProcessHistory], logs: dict[JobId, _Log], counts: _Counts
) -> None:
    """Nobody works on a job that no router ever had."""
    for history in histories:
        for event in history.events:
            if isinstance(event, Claimed | Held) and event.job_id not in logs:
                counts.breaches.append(f"{history.start.service}: {event} of an unknown job")


def _judge_left(
    histories: Sequence[ProcessHistory],
    alive: frozenset[int],
    counts: _Counts,
    *,
    is_stopped: bool,
) -> None:
    """No process is left over, and none that could say so still holds anything."""
    known = {history.start.pid for history in histories}
    for history in histories:
        start = history.start
        name = f"{start.service} {start.pid}"
        is_alive = start.pid in alive
        if is_alive and (is_stopped or (start.parent_pid in known - alive)):
            counts.breaches.append(f"{name} still runs")
        if not is_alive and not history.has_ended:
            continue  # it was killed: what it held went with it
        held = [event for event in history.events if isinstance(event, Holding)]
        if not held:
            counts.breaches.append(f"{name} did not say what it holds")
            continue
        counts.breaches += [
            f"{name} holds {n} {what}"
            for what, n in held[-1].counts.items()
            if n and (is_stopped or what not in STANDING)
        ]
