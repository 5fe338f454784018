"""The wires between workers, router and engines: in order, and cut when a test says so."""

from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from gearfall.core.generation.job import Job, TokenRun
from gearfall.core.ids import Epoch, JobId, RouterId, WorkerId
from services.router.jobs.running_job import Finished, Granted, Kept, Stop, WorkerLink
from services.worker.engine.batching.kv_blocks import BLOCK_TOKENS
from services.worker.migration.events import (
    Aborted,
    Accepted,
    Expired,
    Progress,
    Ready,
    Refused,
    SourceLost,
    TargetLost,
)
from services.worker.migration.source import MigrationSource
from services.worker.migration.source_table import SourceState
from services.worker.migration.target import MigrationTarget

if TYPE_CHECKING:
    from tests.services.worker.migration.migration_world import World
    from tests.services.worker.migration.played_worker import Site

ROUTER = RouterId("router-a")
ADDRESS = "router:1"
JOB = JobId("job-1")


class Line:
    """One direction of a connection: in order, and nothing comes out once it is cut."""

    def __init__(self, take: Callable[..., bool | None]) -> None:
        """`take` gets the next message; it returns False to be given it again later."""
        self._take = take
        self.items: deque[tuple[Any, ...]] = deque()
        self.is_cut = False

    def put(self, *message: Any) -> None:
        self.items.append(message)

    def deliver(self) -> bool:
        """Hand over one message; False when there was none, or it could not be taken."""
        if self.is_cut or not self.items:
            return False
        if self._take(*self.items[0]) is False:
            return False
        if self.items:
            self.items.popleft()
        return True


class Stream:
    """A worker's push stream; implements what the board asks of `PushStream`."""

    def __init__(self, world: "World", site: "Site") -> None:
        self._world, self._site = world, site
        self.address = ADDRESS
        self.router_id: RouterId | None = None
        self.up = Line(self._at_router)
        self.down = Line(self._at_worker)
        self.link: WorkerLink | None = None

    def start(self) -> None:
        if self._world.opens_streams:
            self.connect()

    def reconnect(self) -> None:
        self.notice_at_worker()

    def connect(self) -> None:
        """Say hello and be answered; whatever was on its way before is lost."""
        if self.router_id is not None or not self._world.is_router_alive:
            return
        down = Line(self._at_worker)
        self.up, self.down = Line(self._at_router), down
        self.link = WorkerLink(self._site.worker_id, send=down.put, end=lambda: None)
        self._world.table.open_link(self.link)
        self.router_id = ROUTER
        self._site.board.stream_opened(ADDRESS, ROUTER)

    def notice_at_worker(self) -> None:
        """The worker learns that the stream has broken."""
        if self.router_id is not None:
            self.router_id = None
            self.up.is_cut = self.down.is_cut = True
            if not self._site.board.stream_broke(ADDRESS):
                self._site.board.stream_abandoned(ADDRESS)
                self._site.stream = None

    def notice_at_router(self) -> None:
        """The router learns that the stream has broken."""
        if self.link is not None and self._world.is_router_alive:
            self.up.is_cut = self.down.is_cut = True
            self._world.table.close_link(self.link, "the stream broke")

    def _send(self, *message: Any) -> None:
        if self.router_id is not None:
            self.up.put(*message)

    def send_claim(self, job: Job) -> None:
        self._send("claim", job.job_id, job.epoch)

    def send_step(self, runs: list[TokenRun]) -> None:
        self._send("step", list(runs))

    def send_lost(self, job_id: JobId, epoch: Epoch, reason: str) -> None:
        self._send("lost", job_id, epoch, reason)

    def send_handover(self, job: Job, next_index: int, target_id: WorkerId) -> None:
        self._send("handover", job.job_id, job.epoch, next_index, target_id)

    def _at_router(self, kind: str, *facts: Any) -> None:
        table, link = self._world.table, self.link
        assert link is not None
        match kind:
            case "claim":
                table.claim(link, *facts)
            case "step":
                for run in facts[0]:
                    table.take_run(link, run)
            case "lost":
                table.take_lost(link, *facts)
            case "handover":
                table.hand_over(link, *facts)

    def _at_worker(self, reply: object) -> None:
        board = self._site.board
        match reply:
            case Stop(job_id, epoch, reason, handed_over):
                board.job_stopped(job_id, epoch, reason, handed_over=handed_over)
            case Finished(job_id, epoch):
                board.job_finished(job_id, epoch)
            case Granted(job_id, epoch, _):
                board.job_granted(ADDRESS, job_id, epoch)
            case Kept(job_id, epoch, reason):
                board.job_kept(job_id, epoch, reason)


class Call:
    """One migration's call; implements `SourceWire` here, and `TargetWire` in `_Answers`."""

    def __init__(self, world: "World", source: "Site", target: "Site", *, by_kv: bool) -> None:
        self.world, self.source_site, self.target_site = world, source, target
        self.by_kv = by_kv
        self.forward = Line(self._at_target)
        self.bulk = Line(self._write_blocks)
        self.back = Line(self._at_source)
        self.error: str | None = None
        """How it ended at the source; empty: the job moved."""
        self.source_timer = self.target_timer = False
        self.target: MigrationTarget | None = None
        claim = next(c for c in source.board.running() if c.job.job_id == JOB)
        self.source = MigrationSource(source.board, claim.key, self, world.terms, by_kv=by_kv)
        self.forward.put("offer", self.source.offer)

    def _at_target(self, kind: str, *facts: Any) -> None:
        if not self.target_site.is_alive:
            return
        if kind == "offer":
            (job,) = facts
            if self.target_site.obstacle:
                self.back.put(Refused(self.target_site.obstacle))
                return
            moved = replace(job, epoch=Epoch(job.epoch + 1))
            wire = _Answers(self)
            self.target = MigrationTarget(
                self.target_site.board, moved, wire, self.world.terms, by_kv=self.by_kv
            )
            self.answers = wire
            self.target.start()
            return
        assert self.target is not None or kind in {"eof", "abort"}
        if self.target is None:
            return
        match kind:
            case "tokens":
                self.target.take_tokens(*facts)
            case "freeze":
                self.target.take_freeze(*facts)
            case "abort":
                self.target.handle(Aborted("told"))
            case "eof":
                self.target.handle(SourceLost("the call ended"))

    def _write_blocks(self, start: int, end: int, table: tuple[int, ...]) -> bool | None:
        if self.target is None or not self.target_site.is_alive or not self.answers.is_open:
            return None
        if len(self.answers.table) * BLOCK_TOKENS < end:
            return False
        read, write = self.source_site.process.model.cache, self.target_site.process.model.cache
        for token in range(start, end):
            block, place = divmod(token, BLOCK_TOKENS)
            write[self.answers.table[block], place] = read[table[block], place]
        self.target.take_kv(end)
        return None

    def _at_source(self, event: Any) -> None:
        if self.source_site.is_alive:
            if isinstance(event, Accepted):
                self.source.target_id = self.target_site.worker_id
            self.source.handle(event)

    def notice_at_source(self) -> None:
        """The source learns that the call has broken."""
        self.forward.is_cut = self.bulk.is_cut = self.back.is_cut = True
        if self.source_site.is_alive:
            self.source.handle(TargetLost("the call broke"))

    def notice_at_target(self) -> None:
        """The target learns that the call has broken."""
        self.forward.is_cut = self.bulk.is_cut = self.back.is_cut = True
        if self.target_site.is_alive and self.target is not None:
            self.target.handle(SourceLost("the call broke"))

    def expire_source(self) -> None:
        if self.source_timer and self.source_site.is_alive:
            self.source.handle(Expired())

    def expire_target(self) -> None:
        if self.target_timer and self.target_site.is_alive and self.target is not None:
            self.target.handle(Expired())

    def send_tokens(self, number: int, start: int, ids: tuple[int, ...], kv_tokens: int) -> None:
        self.forward.put("tokens", start, ids, kv_tokens)

    def send_blocks(
        self, start: int, end: int, block_table: tuple[int, ...], *, is_urgent: bool
    ) -> None:
        assert is_urgent is (self.source.source.state is SourceState.FROZEN)
        self.bulk.put(start, end, block_table)

    def send_freeze(self, next_index: int, kv_tokens: int) -> None:
        self.forward.put("freeze", next_index, kv_tokens)

    def commit(self) -> None:
        pass

    def abort(self, reason: str) -> None:
        self.forward.put("abort")

    def set_timer(self, seconds: float) -> None:
        self.source_timer = seconds > 0

    def ended(self, error: str) -> None:
        assert self.error is None
        self.error = error
        if error:
            self.forward.put("eof")


class _Answers:
    """The target's wire."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self.table: tuple[int, ...] = ()
        self.is_open = False
        self.error: str | None = None

    def accept(self, kv_tokens: int, block_table: tuple[int, ...]) -> None:
        self.table, self.is_open = block_table, True
        self._call.back.put(Accepted(kv_tokens))

    def note_blocks(self, block_table: tuple[int, ...]) -> None:
        self.table = block_table

    def close_blocks(self) -> None:
        self.is_open = False

    def send_progress(self, round_number: int, next_index: int, kv_tokens: int) -> None:
        self._call.back.put(Progress(next_index, kv_tokens))

    def send_ready(self, next_index: int) -> None:
        self._call.back.put(Ready(next_index))

    def send_refused(self, reason: str) -> None:
        self._call.back.put(Refused(reason))

    def send_resumed(self, next_index: int) -> None:
        pass

    def set_timer(self, seconds: float) -> None:
        self._call.target_timer = seconds > 0

    def ended(self, error: str) -> None:
        assert self.error is None
        self.error = error
