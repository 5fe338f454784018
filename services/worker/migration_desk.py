"""Migrations of one worker: jobs that leave it and jobs that come to it."""

import logging
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Protocol

from gearfall.core.errors import Conflict, InvalidRequest, NotFound
from gearfall.core.ids import Epoch, JobId, ModelName, WorkerId
from gearfall.infra.convert import job_from_pb
from gearfall.pb import worker_pb2 as pb
from services.worker.claims import Claim
from services.worker.job_board import JobBoard
from services.worker.migration import Terms
from services.worker.migration_call import MigrationCall, Moved
from services.worker.migration_reception import MigrationReception

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
        self, board: JobBoard, hosting: Hosting, worker_id: WorkerId, terms: Terms | None = None
    ) -> None:
        self._board = board
        self._hosting = hosting
        self._worker_id = worker_id
        self._terms = terms or Terms()

    def running(self) -> tuple[Claim, ...]:
        """Return the jobs that this worker owns."""
        return self._board.running()

    async def move(self, job_id: JobId, epoch: Epoch, target_address: str) -> Moved:
        """Move a running job; epoch 0: whichever runs here.

        Raises NotFound when it does not run here, Conflict when it is being moved already,
        Unavailable with the reason when it stays here.
        """
        if not target_address:
            raise InvalidRequest("where to is missing", param="target_address")
        claim = self._find(job_id, epoch)
        digest = self._hosting.digest_of(claim.job.model)
        call = MigrationCall(self._board, claim.key, target_address, self._terms, by_kv=False)
        moved = await call.run(digest)
        _log.info(
            "job moved",
            extra={
                "job_id": job_id,
                "target": moved.target_id,
                "epoch": moved.epoch,
                "by_kv": moved.by_kv,
                "rounds": moved.rounds,
                "tokens": moved.tokens,
                "moved_bytes": moved.moved_bytes,
                "pause_s": round(moved.pause_s, 6),
                "duration_s": round(moved.duration_s, 6),
            },
        )
        return moved

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
        reception = MigrationReception(
            self._board, job, self._worker_id, self._terms, by_kv=first.offer.by_kv
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
        if offer.by_kv:
            return "keys and values can't be taken in here"
        return ""
