"""Jobs between queue, engine and router: performs what the claims' table says.

Owner of the claim book and of one push stream per router. Everything here runs without awaiting,
so an event is always handled whole.
"""

import asyncio
import contextlib
import logging
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence

from gearfall.core.errors import Conflict, NotFound
from gearfall.core.generation.history import Claimed, Held, Released
from gearfall.core.generation.job import Job, Priority, TokenRun
from gearfall.core.ids import Epoch, JobId, ModelName, RouterId, WorkerId
from gearfall.core.ports import QueuedJob
from gearfall.infra.failpoints import failpoint
from gearfall.infra.history_log import record
from services.worker.engine_link.messages import (
    ReleaseJob,
    StepDone,
)
from services.worker.jobs.claim_effects import ENGINE_LOST, GIVEN_BACK, ClaimEffects
from services.worker.jobs.claims import (
    Claim,
    ClaimBook,
    ClaimEvent,
    ClaimKey,
    ClaimState,
    Effect,
)
from services.worker.jobs.followed_jobs import FollowedJobs
from services.worker.jobs.job_follower import JobFollower
from services.worker.jobs.push_stream import PushStream
from services.worker.jobs.router_streams import RouterStreams, StreamOpener
from services.worker.jobs.settlement import Settlement
from services.worker.ports import EngineProcess

NOT_HELD = "the worker no longer held the job when it was granted"

_log = logging.getLogger(__name__)


class JobBoard:
    """Owner of this worker's claims. Implements `PushListener`."""

    def __init__(
        self,
        settlement: Settlement,
        open_stream: StreamOpener,
        is_router_alive: Callable[[RouterId], bool],
        *,
        on_lost: Callable[[ModelName, str], None] = lambda _model, _reason: None,
    ) -> None:
        """`on_lost` hears of each job that is handed back: its model, and `engine` or `drain`."""
        self._book = ClaimBook()
        self._streams = RouterStreams(open_stream, self, is_router_alive)
        self._effects = ClaimEffects(self._streams, settlement, on_lost)
        self._engines = self._effects.engines
        self._watchers: dict[ModelName, Callable[[], None]] = {}
        self._followed = FollowedJobs()
        self._is_empty = asyncio.Event()
        self._is_empty.set()

    async def stop(self, *, timeout_s: float = 1.0) -> None:
        """Let routers answer what they were told, briefly, and end every stream.

        Entries of claims that are left go to whoever reclaims them.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._is_empty.wait()
        await self._streams.stop()

    def watch(self, model: ModelName, on_change: Callable[[], None]) -> None:
        """Call `on_change` whenever the model's claims change, until `unwatch`."""
        self._watchers[model] = on_change

    def unwatch(self, model: ModelName) -> None:
        """Stop calling. Idempotent."""
        self._watchers.pop(model, None)

    @property
    def open_claims(self) -> int:
        """How many claims are not settled yet, of all models."""
        return len(self._book)

    def occupied_slots(self, model: ModelName) -> int:
        """How many slots of the model's replica are taken."""
        return self._book.occupied_slots(model)

    def displaceable_slots(self, model: ModelName) -> int:
        """How many of them are taken by jobs that give way to interactive ones."""
        return self._book.displaceable_slots(model)

    def accept(self, queued: QueuedJob) -> None:
        """Take a claimed queue entry in; it is submitted as soon as its router can be told."""
        job = queued.job
        held = self._book.get(_key(job))
        if held is not None and held.state is ClaimState.HELD:
            # Its source lost the job before it could be moved, and so its router opened this epoch.
            self._apply(_key(job), ClaimEvent.DROP, "it came from the queue")
        if self._book.add(queued):
            record(Claimed, job.job_id, job.epoch)
            self._settle_in(job)

    def hold(self, job: Job, follower: JobFollower) -> None:
        """Take in a job that another worker owns; its follower hears when its router is connected.

        `job` bears the epoch under which it will run here. Raises Conflict when it is here already.
        """
        key = _key(job)
        if self._followed.is_letting_go(key) or not self._book.hold(job):
            raise Conflict(f"job {job.job_id} epoch {job.epoch} is here already")
        self._followed.hold(key, follower)
        record(Held, *key)
        self._settle_in(job)

    def release_held(self, key: ClaimKey, token_ids: Sequence[int]) -> None:
        """Have the engine run a held job and hold back what it brings behind `token_ids`."""
        claim = self._book.get(key)
        assert claim is not None
        self._book.release(key, token_ids)
        if engine := self._engines.get(claim.job.model):
            record(Released, *key)
            engine.send(ReleaseJob(*key))

    def drop_held(self, key: ClaimKey, reason: str) -> None:
        """Forget a held job. Idempotent; without effect on one that was granted."""
        self._apply(key, ClaimEvent.DROP, reason)

    def drop_incoming(self, model: ModelName) -> None:
        """Forget what other workers are moving here."""
        for claim in self._book.of_model(model):
            self._apply(claim.key, ClaimEvent.DROP, GIVEN_BACK)

    def follow(self, key: ClaimKey, follower: JobFollower) -> Claim:
        """Tell `follower` what becomes of a running job and return its claim.

        Raises NotFound when it does not run here, Conflict when somebody follows it already.
        """
        claim = self._book.get(key)
        if claim is None or claim.state is not ClaimState.RUNNING:
            raise NotFound(f"job {key[0]} epoch {key[1]} does not run here")
        self._followed.follow(key, follower)
        return claim

    def unfollow(self, key: ClaimKey, follower: JobFollower) -> None:
        """Tell it nothing more. Idempotent."""
        self._followed.unfollow(key, follower)

    def ask_handover(self, key: ClaimKey, next_index: int, target_id: WorkerId) -> None:
        """Ask a running job's router to make the target its owner, behind what was pushed."""
        claim = self._book.get(key)
        assert claim is not None
        assert claim.next_index == next_index
        self._streams[claim.job.router_address].send_handover(claim.job, next_index, target_id)

    def running(self, model: ModelName | None = None) -> tuple[Claim, ...]:
        """Return the claims that run here, of one model or of all, oldest first."""
        claims = self._book if model is None else self._book.of_model(model)
        return tuple(c for c in claims if c.state is ClaimState.RUNNING)

    def engine_of(self, model: ModelName) -> EngineProcess | None:
        """Return the model's engine while it serves."""
        return self._engines.get(model)

    def _settle_in(self, job: Job) -> None:
        self._is_empty.clear()
        if self._streams.is_gone(job.router_id):
            self._apply(_key(job), ClaimEvent.ROUTER_GONE)
            return
        stream = self._streams.open(job.router_address)
        if stream.router_id == job.router_id:
            self._apply(_key(job), ClaimEvent.CONNECTED)
        elif stream.router_id is not None:
            self._meet_another(job, stream)

    def _meet_another(self, job: Job, stream: PushStream) -> None:
        """Another router than the job's serves at its address, or the stream is out of date."""
        if self._streams.is_alive(job.router_id):
            stream.reconnect()
        else:
            self._apply(_key(job), ClaimEvent.ROUTER_GONE)

    def attach_engine(self, model: ModelName, engine: EngineProcess) -> None:
        """Submit the model's jobs to `engine` from now on."""
        self._engines[model] = engine

    def detach_engine(self, model: ModelName) -> None:
        """The model's engine is gone: its running jobs are lost here. Idempotent."""
        if self._engines.pop(model, None) is not None:
            for claim in self._book.of_model(model):
                self._apply(claim.key, ClaimEvent.ENGINE_DIED, ENGINE_LOST)
            self._followed.lose_engine(model)

    def give_back(
        self, model: ModelName, priorities: Collection[Priority] = tuple(Priority)
    ) -> tuple[JobId, ...]:
        """Hand the model's running jobs back to their routers and return which; drop held ones.

        `priorities`: of which jobs.
        """
        claims = [
            claim
            for claim in self._book.of_model(model)
            if claim.job.priority in priorities
            and claim.state in {ClaimState.RUNNING, ClaimState.HELD}
        ]
        running = tuple(c.job.job_id for c in claims if c.state is ClaimState.RUNNING)
        for claim in claims:
            self._apply(claim.key, ClaimEvent.GIVE_BACK, GIVEN_BACK)
        return running

    def push_step(self, step: StepDone) -> None:
        """Send one decode step's tokens: one message for each router that has a part in it."""
        runs_by_address: defaultdict[str, list[TokenRun]] = defaultdict(list)
        for run in step.runs:
            if taken := self._book.take(run):
                claim, new = taken
                failpoint("worker.push", job_id=run.job_id, model=claim.job.model)
                runs_by_address[claim.job.router_address].append(new)
        for address, runs in runs_by_address.items():
            self._push(address, runs)
        for report in step.reports:
            self._followed.take_report(report)

    def _push(self, address: str, runs: Sequence[TokenRun]) -> None:
        self._streams[address].send_step(runs)
        for run in runs:
            key = (run.job_id, run.epoch)
            if follower := self._followed.get(key):
                follower.pushed(run)
            if run.finish is not None:
                self._apply(key, ClaimEvent.FINAL_RUN, "it has ended")

    def stream_opened(self, address: str, router_id: RouterId) -> None:
        """See `PushListener`."""
        for claim in self._book.of_address(address):
            is_its_own = claim.job.router_id == router_id
            event = ClaimEvent.CONNECTED if is_its_own else ClaimEvent.ROUTER_GONE
            self._apply(claim.key, event)

    def stream_broke(self, address: str) -> bool:
        """See `PushListener`."""
        claims = self._book.of_address(address)
        for claim in claims:
            self._apply(claim.key, ClaimEvent.BROKEN, "the stream to its router broke")
        return bool(claims)

    def stream_abandoned(self, address: str) -> None:
        """See `PushListener`."""
        claims = self._book.of_address(address)
        self._streams.abandon(address, [claim.job.router_id for claim in claims])
        if claims:
            _log.warning("router is gone", extra={"address": address, "jobs": len(claims)})
        for claim in claims:
            self._apply(claim.key, ClaimEvent.ROUTER_GONE)

    def job_granted(self, address: str, job_id: JobId, epoch: Epoch) -> None:
        """See `PushListener`. A job that isn't held any more goes back to its router."""
        claim = self._book.get((job_id, epoch))
        if claim is not None and claim.is_released:
            self._apply(claim.key, ClaimEvent.GRANTED)
            return
        _log.warning("granted a job that is not held", extra={"job_id": job_id, "epoch": epoch})
        self._apply((job_id, epoch), ClaimEvent.DROP, "granted before it was ready")
        if stream := self._streams.get(address):
            stream.send_lost(job_id, epoch, NOT_HELD)

    def job_kept(self, job_id: JobId, epoch: Epoch, reason: str) -> None:
        """See `PushListener`."""
        if follower := self._followed.get((job_id, epoch)):
            follower.kept(reason)

    def job_stopped(
        self, job_id: JobId, epoch: Epoch, reason: str, *, handed_over: bool = False
    ) -> None:
        """See `PushListener`."""
        follower = self._followed.get((job_id, epoch))
        if handed_over and follower is not None:
            follower.handed_over()
        _log.debug("job stopped", extra={"job_id": job_id, "epoch": epoch, "reason": reason})
        self._apply((job_id, epoch), ClaimEvent.STOP, reason)

    def job_finished(self, job_id: JobId, epoch: Epoch) -> None:
        """See `PushListener`."""
        self._apply((job_id, epoch), ClaimEvent.FINISHED)

    def check(self) -> None:
        """Assert that every claim has a stream that will decide about it."""
        self._book.check()
        for claim in self._book:
            stream = self._streams.get(claim.job.router_address)
            assert stream is not None
            may_connect = claim.state in {ClaimState.UNSETTLED, ClaimState.HELD}
            assert may_connect or stream.router_id == claim.job.router_id

    def _apply(self, key: ClaimKey, event: ClaimEvent, reason: str = "") -> None:
        claim = self._book.get(key)
        if claim is None:
            return
        before = claim.state
        todos = self._book.apply(key, event)
        is_gone = self._book.get(key) is None
        # Told first: what a follower does in the job's blocks has to end before they are freed.
        follower = self._followed.get(key)
        if follower and (is_gone or claim.state is not before or event is ClaimEvent.CONNECTED):
            follower.claim_stepped(event, reason or event.value)
        for todo in todos:
            if todo.effect is Effect.PUSH_HELD_BACK:
                self._push_held_back(key)
            elif not self._effects.perform(todo, event):
                self._apply(key, ClaimEvent.ENGINE_DIED)
        if before is ClaimState.HELD and is_gone:
            self._let_go(claim)
        if len(self._book) == 0:
            self._is_empty.set()
        if on_change := self._watchers.get(claim.job.model):
            on_change()

    def _let_go(self, claim: Claim) -> None:
        """Have the engine say when a held job is gone: no late report is taken for a new hold."""
        if engine := self._engines.get(claim.job.model):
            self._followed.let_go(claim.key, claim.job.model)
            engine.send(ReleaseJob(*claim.key))

    def _push_held_back(self, key: ClaimKey) -> None:
        claim = self._book.get(key)
        assert claim is not None
        held_back, claim.held_back = claim.held_back, []
        if held_back:
            self._push(claim.job.router_address, held_back)


def _key(job: Job) -> ClaimKey:
    return (job.job_id, job.epoch)
