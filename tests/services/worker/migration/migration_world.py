"""Two workers and a router that move one job about, over wires that lose what they are told to.

Everything but wires, clocks and the model's arithmetic is the real thing: the router's job table,
both workers' job boards, engines with their paged caches, and both ends of each migration.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from gearfall.core.ids import Epoch, JobId, ModelName, RequestId, RouterId, WorkerId
from gearfall.core.job import Job, TokenRun
from gearfall.core.sampling import SamplingParams
from gearfall.core.token_log import LogState
from gearfall.infra.memory_queue import MemoryQueue, MemoryQueueServer
from services.router.background import Background
from services.router.backlog import Backlog
from services.router.jobs import JobTable
from services.router.running_job import Finished, Granted, Kept, Stop, WorkerLink
from services.worker.engine.batch import Batch
from services.worker.engine.engine import Engine
from services.worker.engine.kv_blocks import BLOCK_TOKENS, KvBlocks
from services.worker.engine_link.messages import CancelJob, StepDone, SubmitJob
from services.worker.jobs.job_board import JobBoard
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
from services.worker.migration.terms import Terms
from tests.services.worker.counting_model import CountingModel, answer

MODEL = ModelName("counter")
ROUTER = RouterId("router-a")
ADDRESS = "router:1"
JOB = JobId("job-1")
BLOCKS = 24
ROUNDS_TO_HEAL = 2000


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


class Process:
    """An engine and what is on its way to and from it; implements `ports.EngineProcess` in part."""

    kv_memory = None
    arithmetic = "exact"

    def __init__(self, site: "Site") -> None:
        self._site = site
        self.model = CountingModel(BLOCKS)
        self.blocks = KvBlocks(BLOCKS)
        self.batch = Batch(self.blocks, slots=2, step_tokens=20)
        self.engine = Engine(self.model, self.batch, context_tokens=200, clock=lambda: 0.0)
        self.inbox: deque[Any] = deque()
        self.out = Line(self._at_board)

    def send(self, message: object) -> None:
        self.inbox.append(message)

    def step(self) -> bool:
        """Take in the messages and compute a step; False when there was nothing to do."""
        had_messages = bool(self.inbox)
        while self.inbox:
            message = self.inbox.popleft()
            if isinstance(message, SubmitJob):
                self.engine.submit(message)
            elif isinstance(message, CancelJob):
                self.engine.cancel(message)
            else:
                self.engine.migrate(message)
        if self.engine.has_reports:
            self.out.put(self.engine.report())
        if self.engine.is_idle:
            return had_messages
        self.out.put(self.engine.step())
        self.engine.check()
        return True

    def _at_board(self, step: StepDone) -> None:
        self._site.board.push_step(step)

    def check_empty(self) -> None:
        assert self.batch.running == self.batch.waiting == 0
        assert not self.blocks._tables
        assert not self.blocks._pinned
        assert not self.blocks._left


class Site:
    """One worker."""

    def __init__(self, world: "World", name: str) -> None:
        self.world = world
        self.worker_id = WorkerId(name)
        self.is_alive = True
        self.stream: Stream | None = None
        self.board = JobBoard(self, self._open_stream, lambda _: world.is_router_alive)  # type: ignore[arg-type]
        self.obstacle = ""
        self.process = Process(self)
        self.board.attach_engine(MODEL, self.process)  # type: ignore[arg-type]

    def _open_stream(self, address: str, listener: object) -> Any:
        self.stream = Stream(self.world, self)
        return self.stream

    def acknowledge(self, model: ModelName, entry_ids: Any) -> None:
        """What the board asks of a `Settlement`."""
        for entry_id in entry_ids:
            self.world.queue_server.queues.get(model, {}).pop(entry_id, None)

    def restart_engine(self) -> None:
        """The engine dies; another one serves at once."""
        self.board.detach_engine(MODEL)
        self.process = Process(self)
        self.board.attach_engine(MODEL, self.process)  # type: ignore[arg-type]

    def check_empty(self) -> None:
        self.board.check()
        assert len(self.board._book) == 0
        assert not self.board._followers
        assert not self.board._letting_go
        self.process.check_empty()


class Call:
    """One migration's call; implements `SourceWire` here, and `TargetWire` in `_Answers`."""

    def __init__(self, world: "World", source: Site, target: Site, *, by_kv: bool) -> None:
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


@dataclass
class Client:
    """Who asked; implements `JobListener`."""

    token_ids: list[int] = field(default_factory=list)
    owners: list[tuple[str, int]] = field(default_factory=list)
    finishes: int = 0
    error: str = ""

    def on_bound(self, worker: WorkerId, epoch: Epoch) -> None:
        self.owners.append((worker, epoch))

    def on_moved(self, worker: WorkerId, epoch: Epoch) -> None:
        self.owners.append((worker, epoch))

    def on_run(self, run: TokenRun) -> None:
        assert run.index == len(self.token_ids)
        self.token_ids.extend(run.token_ids)
        self.finishes += run.finish is not None

    def on_lost(self, epoch: Epoch, reason: str) -> None:
        pass

    def on_failed(self, error: Exception) -> None:
        self.error = str(error)


class _Room:
    def set_waiting(self, model: ModelName, backlog: Backlog) -> None:
        pass


class World:
    """Two workers, one router, one job."""

    def __init__(
        self, *, prompt_tokens: int = 20, max_tokens: int = 30, terms: Terms | None = None
    ) -> None:
        self.terms = terms or Terms(freeze_gap_tokens=2, freeze_gap_kv_tokens=20)
        self.is_router_alive = True
        self.opens_streams = True
        self.queue_server = MemoryQueueServer()
        self.queue = MemoryQueue(self.queue_server)
        self.background = Background()
        self.table = JobTable(self.queue, _Room(), self.background)
        self.client = Client()
        self.prompt = tuple((7 * i + 3) % 31 for i in range(prompt_tokens))
        self.truth = answer(self.prompt, max_tokens)
        self.max_tokens = max_tokens
        self.is_cancelled = False
        self.sites = {name: Site(self, name) for name in ("a", "b")}
        self.calls: list[Call] = []

    async def start(self) -> None:
        """Submit the job and have worker a claim it."""
        job = Job(
            job_id=JOB,
            request_id=RequestId("request"),
            model=MODEL,
            epoch=Epoch(1),
            router_id=ROUTER,
            router_address=ADDRESS,
            prompt_token_ids=self.prompt,
            generated_token_ids=(),
            sampling=SamplingParams(max_tokens=self.max_tokens, temperature=0.0),
        )
        deadline_s = asyncio.get_running_loop().time() + 3600
        await self.table.submit(job, self.client, deadline_s=deadline_s, patience_s=1)
        await self.claim("a")
        self.check()

    async def stop(self) -> None:
        await self.background.stop()

    async def turn(self) -> None:
        """Let the router's own tasks run."""
        for _ in range(6):
            await asyncio.sleep(0)

    async def claim(self, name: str) -> bool:
        """Have a worker take a job from the queue if it has room; False when there is none."""
        site = self.sites[name]
        if not site.is_alive or site.board.occupied_slots(MODEL) >= 2:
            return False
        alive = frozenset(s.worker_id for s in self.sites.values() if s.is_alive)
        taken = await self.queue.reclaim(MODEL, site.worker_id, alive=alive, max_jobs=1)
        if not taken and not self.queue_server.queues.get(MODEL):
            return False
        if not taken:
            taken = await self.queue.claim(MODEL, site.worker_id, max_jobs=1, block_s=0)
        for queued in taken:
            site.board.accept(queued)
        return bool(taken)

    @property
    def owner(self) -> Site | None:
        """The worker that its own board says runs the job, and the router agrees."""
        running = self.table._jobs.get(JOB)
        if running is None or running.log.owner is None:
            return None
        return self.sites[running.log.owner]

    def migrate(self, *, by_kv: bool) -> bool:
        """Start to move the job to the other worker; False when its owner does not run it."""
        site = self.owner
        if site is None or not site.is_alive:
            return False
        claims = [c for c in site.board.running() if c.job.job_id == JOB]
        if not claims or claims[-1].key in site.board._followers:
            return False
        (other,) = (s for s in self.sites.values() if s is not site)
        self.calls.append(Call(self, site, other, by_kv=by_kv))
        return True

    def kill(self, name: str) -> None:
        """A worker dies at once; nobody has noticed yet."""
        site = self.sites[name]
        site.is_alive = False
        if site.stream is not None:
            site.stream.down.is_cut = True
        site.process.out.is_cut = True

    def kill_router(self) -> None:
        self.is_router_alive = False
        for site in self.sites.values():
            if site.stream is not None:
                site.stream.up.is_cut = site.stream.down.is_cut = True

    def cancel(self) -> None:
        """The client goes away."""
        self.is_cancelled = True
        if self.is_router_alive:
            self.table.close(JOB, "cancelled")

    def lines(self) -> list[Line]:
        """Every line on which something can travel now."""
        found = []
        for site in self.sites.values():
            if site.is_alive:
                found.append(site.process.out)
            if site.stream is not None:
                found += [site.stream.up, site.stream.down]
        for call in self.calls:
            found += [call.forward, call.bulk, call.back]
        return found

    def check(self) -> None:
        """The promises, at any moment."""
        if self.is_router_alive:
            self.table.check()
        for site in self.sites.values():
            if site.is_alive:
                site.board._book.check()
        ids = self.client.token_ids
        assert ids == self.truth[: len(ids)]
        assert self.client.finishes <= 1

    async def run(self, *, steps: int = 1) -> None:
        """Everything that can go on does, so many times."""
        for _ in range(steps):
            await self.advance()

    async def advance(self) -> bool:
        """Deliver what is on its way and step both engines once; False when nothing happened."""
        has_moved = False
        for line in self.lines():
            while line.deliver():
                has_moved = True
                self.check()
        for site in self.sites.values():
            has_moved |= site.is_alive and site.process.step()
        await self.turn()
        return has_moved

    async def heal(self) -> None:
        """Let every broken thing be noticed and everything end; then look at what is left."""
        for _ in range(ROUNDS_TO_HEAL):
            self._notice()
            has_moved = await self.advance()
            for name in self.sites:
                has_moved |= await self.claim(name)
            if not has_moved and self._is_over():
                break
            if not has_moved:
                for call in self.calls:
                    call.expire_source()
                    call.expire_target()
        self.check()
        self._check_end()

    def _is_over(self) -> bool:
        is_done = not self.is_router_alive or JOB not in self.table._jobs or not self._is_served()
        return is_done and all(
            len(s.board._book) == 0 and not s.process.inbox
            for s in self.sites.values()
            if s.is_alive
        )

    def _is_served(self) -> bool:
        return any(site.is_alive for site in self.sites.values())

    def _notice(self) -> None:
        """What is cut or dead is found out."""
        for call in self.calls:
            sites = (call.source_site, call.target_site)
            is_cut = call.forward.is_cut or call.back.is_cut or call.bulk.is_cut
            if is_cut or not all(site.is_alive for site in sites):
                call.notice_at_source()
                call.notice_at_target()
        for site in self.sites.values():
            stream = site.stream
            if stream is None:
                continue
            is_cut = stream.up.is_cut or stream.down.is_cut
            if is_cut or not site.is_alive or not self.is_router_alive:
                stream.notice_at_router()
                if site.is_alive:
                    stream.notice_at_worker()
            if site.is_alive and self.is_router_alive and site.stream is not None:
                site.stream.connect()
            elif site.is_alive and site.stream is not None:
                site.board.stream_abandoned(ADDRESS)
                site.stream = None

    def _check_end(self) -> None:
        for site in self.sites.values():
            if site.is_alive:
                site.check_empty()
        for call in self.calls:
            if call.source_site.is_alive:
                assert call.source.is_over
            if call.target is not None and call.target_site.is_alive:
                assert call.target.is_over
        if not self.is_router_alive or self.is_cancelled:
            return
        if self._is_served():
            assert self.client.token_ids == self.truth
            assert self.client.finishes == 1
            assert self.client.error == ""
            assert not self.queue_server.queues.get(MODEL)
        else:
            assert self.table._jobs[JOB].log.state is LogState.WAITING
