"""Migrations of one worker: jobs that leave it and jobs that come to it."""

import logging
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Protocol

from gearfall.core.errors import Conflict, InvalidRequest, NotFound, Unavailable
from gearfall.core.ids import Epoch, JobId, ModelName, WorkerId
from gearfall.infra.net.convert import job_from_pb
from gearfall.infra.net.token_listener import Guest, TokenListener
from gearfall.pb import worker_pb2 as pb
from services.worker.engine_link.kv_memory import KvMemory
from services.worker.jobs.claims import Claim
from services.worker.jobs.job_board import JobBoard
from services.worker.migration.call import MigrationCall, Moved
from services.worker.migration.cost import Choice, DataPath, Line, MigrationCosts, Sample
from services.worker.migration.kv_carriers import StreamDoor
from services.worker.migration.kv_groups import kv_shape
from services.worker.migration.kv_ways import KvWays
from services.worker.migration.reception import MigrationReception
from services.worker.migration.terms import Terms

NO_FIT = "the keys and values do not fit the cache here"

_log = logging.getLogger(__name__)


class Hosting(Protocol):
    """What this worker hosts."""

    def digest_of(self, model: ModelName) -> str:
        """Return which checkpoint the model's replica serves. Raises NotFound when none does."""
        ...

    def find_obstacle(self, model: ModelName) -> str:
        """Return why the model takes no more jobs here; empty if it does."""
        ...


class MigrationDesk:
    """Sends and takes in running jobs."""

    def __init__(
        self,
        board: JobBoard,
        hosting: Hosting,
        worker_id: WorkerId,
        *,
        host: str,
        terms: Terms | None = None,
        on_ended: Callable[[ModelName, Moved | None], None] = lambda _model, _moved: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`host`: address on which keys and values may come in, at a port that is picked.

        `on_ended` hears of each migration from here; without a `Moved` the job stayed.
        """
        self._on_ended = on_ended
        self._board = board
        self._hosting = hosting
        self._worker_id = worker_id
        self._host = host
        self._terms = terms or Terms()
        self._costs = MigrationCosts()
        self._unfit: set[tuple[ModelName, str]] = set()
        """Targets whose caches have another shape."""
        self._ways = KvWays()
        self._clock = clock
        self._listener: TokenListener | None = None
        """Opened when the first job comes by KV."""
        self.stream_door = StreamDoor(self._take_guest)
        """Where keys and values come in that did not find the socket."""

    def close(self) -> None:
        """Take in no more keys and values. Idempotent."""
        if self._listener is not None:
            self._listener.close()

    def running(self) -> tuple[Claim, ...]:
        """Return the jobs that this worker owns."""
        return self._board.running()

    async def move(
        self,
        job_id: JobId,
        epoch: Epoch,
        target_address: str,
        *,
        path: DataPath | None = None,
        within_s: float = 0.0,
    ) -> Moved:
        """Move a running job; epoch 0: whichever runs here. `path` None: as seems faster.

        `within_s`: there is no more time than this, whatever it costs those on the target; 0:
        there is.

        Raises NotFound when it does not run here, Conflict when it is being moved already,
        Unavailable with the reason when it stays here.
        """
        if not target_address:
            raise InvalidRequest("where to is missing", param="target_address")
        claim = self._find(job_id, epoch)
        moved = None
        try:
            moved = await self._move_best(claim, target_address, path, within_s)
            self._note_cost(claim.job.model, target_address, moved)
        finally:
            self._on_ended(claim.job.model, moved)
        _log.info("job moved", extra={"job_id": job_id, **_facts(moved)})
        return moved

    def move_cost(self, model: ModelName) -> Line:
        """Return the seconds that moving one of the model's jobs takes, by its tokens."""
        memory = self._memory_of(model)
        return self._costs.line_of(model, memory.layout.token_bytes if memory else 0)

    def _note_cost(self, model: ModelName, target_address: str, moved: Moved) -> None:
        size = moved.tokens if moved.path is DataPath.TOKENS else moved.moved_bytes
        sample = Sample(size, moved.duration_s, moved.bulk_s)
        self._costs.note(model, target_address, moved.path, sample)

    async def _move_best(
        self, claim: Claim, target_address: str, path: DataPath | None, within_s: float
    ) -> Moved:
        """Move by what seems faster, or by the other way where the caches do not fit."""
        choice = self._choose(claim, target_address, path)
        try:
            return await self._move(claim, target_address, choice, within_s)
        except Unavailable as error:
            is_kv = choice.path is not DataPath.TOKENS
            if path is not None or not is_kv or NO_FIT not in error.message:
                raise
            extra = {"job_id": claim.job.job_id, "reason": error.message}
            _log.info("moved by tokens", extra=extra)
            self._unfit.add((claim.job.model, target_address))
            choice = self._choose(claim, target_address, None)
            return await self._move(claim, target_address, choice, within_s)

    def _choose(self, claim: Claim, target: str, asked: DataPath | None) -> Choice:
        job, memory = claim.job, self._memory_of(claim.job.model)
        tokens = len(job.prompt_token_ids) + claim.next_index
        kv_bytes = tokens * memory.layout.token_bytes if memory else 0
        is_kv_asked = asked is not None and asked is not DataPath.TOKENS
        if is_kv_asked and memory is None:
            raise Unavailable(f"the keys and values of {job.model} can't be read here")
        kv_path = asked if is_kv_asked else self._ways.path_to(target, self._clock())
        can_kv = is_kv_asked or (memory is not None and (job.model, target) not in self._unfit)
        choice = self._costs.choose(
            job.model, target, tokens=tokens, kv_bytes=kv_bytes, kv_path=kv_path if can_kv else None
        )
        if asked is None or asked is choice.path:
            return choice
        return Choice(asked, predicted_s=choice.other_s, other_s=choice.predicted_s)

    async def _move(
        self, claim: Claim, target_address: str, choice: Choice, within_s: float
    ) -> Moved:
        job = claim.job
        digest = self._hosting.digest_of(job.model)
        memory = None if choice.path is DataPath.TOKENS else self._memory_of(job.model)
        call = MigrationCall(
            self._board,
            claim.key,
            target_address,
            self._terms,
            memory,
            is_streamed=choice.path is DataPath.KV_STREAM,
            within_s=within_s,
        )
        moved = await call.run(digest, self._arithmetic_of(job.model))
        predicted_s = choice.predicted_s
        self._ways.note(target_address, choice.path, moved.path, self._clock())
        if moved.path is not choice.path:  # the socket could not be connected
            size = moved.moved_bytes
            predicted_s = self._costs.predict(job.model, target_address, moved.path, size)
        return replace(moved, predicted_s=predicted_s, predicted_other_s=choice.other_s)

    async def receive(
        self, frames: AsyncIterator[pb.MigrationFrame]
    ) -> AsyncIterator[pb.MigrationReply]:
        """Take in what one source sends; yield what it is to hear."""
        first = await anext(aiter(frames), None)
        if first is None or first.WhichOneof("frame") != "offer":
            raise InvalidRequest("a migration starts with an offer", param="offer")
        offered = job_from_pb(first.offer.job)
        obstacle = self._find_obstacle(offered.model, first.offer)
        if obstacle:
            _log.info("migration refused", extra={"job_id": offered.job_id, "reason": obstacle})
            yield pb.MigrationReply(refused=pb.MigrationRefused(reason=obstacle))
            return
        job = replace(offered, epoch=Epoch(offered.epoch + 1))
        kv = self._open_inlet(offered.model) if first.offer.by_kv else None
        reception = MigrationReception(
            self._board, job, self._worker_id, self._terms, kv, within_s=first.offer.within_s
        )
        async for reply in reception.serve(frames):
            yield reply

    def _find(self, job_id: JobId, epoch: Epoch) -> Claim:
        claims = [c for c in self._board.running() if c.job.job_id == job_id]
        if not claims:
            raise NotFound(f"job {job_id} does not run here")
        claim = claims[-1]
        if epoch not in {0, claim.job.epoch}:
            raise Conflict(f"job {job_id} runs here under epoch {claim.job.epoch}, not {epoch}")
        return claim

    def _find_obstacle(self, model: ModelName, offer: pb.MigrationOffer) -> str:
        obstacle = self._hosting.find_obstacle(model)
        if obstacle:
            return obstacle
        digest = self._hosting.digest_of(model)
        if digest != offer.model_digest:
            return f"{model} is the checkpoint {digest} here, not {offer.model_digest}"
        arithmetic = self._arithmetic_of(model)
        if arithmetic != offer.arithmetic:
            own, theirs = arithmetic or "its device's", offer.arithmetic or "its device's"
            return f"{model} is computed by {own} arithmetic here, not by {theirs}"
        memory = self._memory_of(model)
        if offer.by_kv and (memory is None or kv_shape(memory.layout) != offer.kv_shape):
            return NO_FIT
        return ""

    def _memory_of(self, model: ModelName) -> KvMemory | None:
        engine = self._board.engine_of(model)
        return engine.kv_memory if engine else None

    def _arithmetic_of(self, model: ModelName) -> str:
        engine = self._board.engine_of(model)
        return engine.arithmetic if engine else ""

    def _open_inlet(self, model: ModelName) -> tuple[TokenListener, KvMemory]:
        memory = self._memory_of(model)
        assert memory is not None
        if self._listener is None:
            self._listener = TokenListener(self._host, name="kv-inlet")
        return self._listener, memory

    def _take_guest(self, token: bytes) -> Guest | None:
        return None if self._listener is None else self._listener.take(token)


def _facts(moved: Moved) -> dict[str, object]:
    """Return what a log line says about a migration."""
    return {
        "target": moved.target_id,
        "epoch": moved.epoch,
        "path": moved.path.value,
        "rounds": moved.rounds,
        "tokens": moved.tokens,
        "moved_bytes": moved.moved_bytes,
        "pause_s": round(moved.pause_s, 6),
        "duration_s": round(moved.duration_s, 6),
        "predicted_s": round(moved.predicted_s, 6),
        "predicted_other_s": round(moved.predicted_other_s, 6),
    }
