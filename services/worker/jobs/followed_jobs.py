"""Which jobs somebody follows, and held ones that were dropped and may still be in their engine."""

from gearfall.core.errors import Conflict
from gearfall.core.ids import ModelName
from services.worker.engine_link.messages import JobPhase, JobReport
from services.worker.jobs.claims import ClaimKey
from services.worker.jobs.job_follower import JobFollower


class FollowedJobs:
    """Owner of both, by (job, epoch)."""

    def __init__(self) -> None:
        self._followers: dict[ClaimKey, JobFollower] = {}
        self._letting_go: dict[ClaimKey, ModelName] = {}
        """Held jobs that were dropped, until their engine has said that they are gone."""

    def __bool__(self) -> bool:
        return bool(self._followers or self._letting_go)

    def follow(self, key: ClaimKey, follower: JobFollower) -> None:
        """Tell `follower` what becomes of a job; raises Conflict when somebody follows it."""
        if key in self._followers:
            raise Conflict(f"job {key[0]} is being moved already")
        self._followers[key] = follower

    def hold(self, key: ClaimKey, follower: JobFollower) -> None:
        """The same of a job that is held: it is its follower's alone."""
        self._followers[key] = follower

    def unfollow(self, key: ClaimKey, follower: JobFollower) -> None:
        """Tell it nothing more. Idempotent."""
        if self._followers.get(key) is follower:
            del self._followers[key]

    def get(self, key: ClaimKey) -> JobFollower | None:
        """Return who follows a job."""
        return self._followers.get(key)

    def let_go(self, key: ClaimKey, model: ModelName) -> None:
        """A held job was dropped: no late report of it is taken for one of a new hold."""
        self._letting_go[key] = model

    def is_letting_go(self, key: ClaimKey) -> bool:
        """Whether its engine has not yet said that a dropped job is gone."""
        return key in self._letting_go

    def lose_engine(self, model: ModelName) -> None:
        """Nothing of the model is in an engine any more."""
        self._letting_go = {k: m for k, m in self._letting_go.items() if m != model}

    def take_report(self, report: JobReport) -> None:
        """Tell a job's follower what the engine said about it."""
        key = (report.job_id, report.epoch)
        if key in self._letting_go:
            # It may be here anew, from the queue: what was held is gone all the same.
            if report.phase not in {JobPhase.HELD, JobPhase.REFUSED}:
                del self._letting_go[key]
        elif follower := self._followers.get(key):
            follower.reported(report)
