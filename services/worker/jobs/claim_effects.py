"""What the claims' table asks for, done: messages to routers and engines, settled queue entries."""

from collections.abc import Callable

from gearfall.core.generation.history import Cancelled, Settled, Submitted
from gearfall.core.generation.job import Job
from gearfall.core.ids import ModelName
from gearfall.infra.failpoints import failpoint
from gearfall.infra.history_log import record
from services.worker.engine_link.messages import CancelJob
from services.worker.jobs.claims import ClaimEvent, Effect, Todo
from services.worker.jobs.job_follower import submission
from services.worker.jobs.router_streams import RouterStreams
from services.worker.jobs.settlement import Settlement
from services.worker.ports import EngineProcess

GIVEN_BACK = "the replica is being drained"
ENGINE_LOST = "the engine process is gone"


class ClaimEffects:
    """Owner of the engines that serve, by model."""

    def __init__(
        self,
        streams: RouterStreams,
        settlement: Settlement,
        on_lost: Callable[[ModelName, str], None],
    ) -> None:
        """`on_lost` hears of each job that is handed back: its model, and `engine` or `drain`."""
        self._streams = streams
        self._settlement = settlement
        self._on_lost = on_lost
        self.engines: dict[ModelName, EngineProcess] = {}

    def perform(self, todo: Todo, event: ClaimEvent) -> bool:
        """Do what `event` asks of one claim; False when there is no engine to submit its job to.

        Held back tokens are their holder's to push.
        """
        job = todo.job
        match todo.effect:
            case Effect.SEND_CLAIM:
                self._streams[job.router_address].send_claim(job)
            case Effect.SEND_LOST:
                self._hand_back(job, is_drain=event is ClaimEvent.GIVE_BACK)
            case Effect.SUBMIT:
                return self._submit(job)
            case Effect.CANCEL:
                if engine := self.engines.get(job.model):
                    record(Cancelled, job.job_id, job.epoch)
                    engine.send(CancelJob(job.job_id, job.epoch))
            case Effect.ACKNOWLEDGE if todo.entry_ids:
                failpoint("worker.release", job_id=job.job_id, model=job.model)
                record(Settled, job.job_id, job.epoch)
                self._settlement.acknowledge(job.model, todo.entry_ids)
        return True

    def _hand_back(self, job: Job, *, is_drain: bool) -> None:
        reason = GIVEN_BACK if is_drain else ENGINE_LOST
        self._streams[job.router_address].send_lost(job.job_id, job.epoch, reason)
        self._on_lost(job.model, "drain" if is_drain else "engine")

    def _submit(self, job: Job) -> bool:
        engine = self.engines.get(job.model)
        if engine is None:
            return False
        failpoint("worker.submit", job_id=job.job_id, model=job.model)
        record(Submitted, job.job_id, job.epoch)
        engine.send(submission(job))
        return True
