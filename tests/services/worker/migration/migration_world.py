"""Two workers and a router that move one job about, over wires that lose what they are told to.

Everything but wires, clocks and the model's arithmetic is the real thing: the router's job table,
both workers' job boards, engines with their paged caches, and both ends of each migration.
"""

import asyncio
from dataclasses import dataclass, field

from gearfall.core.generation.job import Job, TokenRun
from gearfall.core.generation.sampling import SamplingParams
from gearfall.core.generation.token_log import LogState
from gearfall.core.ids import Epoch, ModelName, RequestId, WorkerId
from gearfall.infra.queue.memory_queue import MemoryQueue, MemoryQueueServer
from services.router.background import Background
from services.router.jobs.backlog import Backlog
from services.router.jobs.job_table import JobTable
from services.worker.migration.terms import Terms
from tests.services.worker.counting_model import answer
from tests.services.worker.migration.played_worker import MODEL, Site
from tests.services.worker.migration.wires import ADDRESS, JOB, ROUTER, Call, Line

ROUNDS_TO_HEAL = 2000


@dataclass
class Client:
    """Who asked; implements `JobListener`."""

    token_ids: list[int] = field(default_factory=list)
    owners: list[tuple[str, int]] = field(default_factory=list)
    finishes: int = 0
    error: str = ""

    def on_bound(self, worker: WorkerId, epoch: Epoch, held_s: float) -> None:
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
        if not claims or site.board._followed.get(claims[-1].key):
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
