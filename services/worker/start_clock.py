"""Measures the phases of one replica start."""

from dataclasses import dataclass, field, replace

from gearfall.core.records import StartTimeline
from services.worker.engine_messages import EngineReady


@dataclass(slots=True)
class StartClock:
    """Collects one start's timeline; every time is passed in, monotonic, in seconds."""

    asked_s: float
    """When the start was asked for."""
    _mark_s: float = field(init=False)
    _timeline: StartTimeline = field(init=False, default_factory=StartTimeline)

    def __post_init__(self) -> None:
        self._mark_s = self.asked_s

    def begin_load(self, now_s: float) -> None:
        """Waiting is over; the store is asked."""
        self._timeline = replace(self._timeline, queued_s=self._lap(now_s))

    def end_load(self, now_s: float, crossed: StartTimeline) -> None:
        """Take over the tiers that the store says were crossed."""
        self._lap(now_s)
        self._timeline = replace(
            self._timeline,
            remote_s=crossed.remote_s,
            ssd_s=crossed.ssd_s,
            device_s=crossed.device_s,
            from_tier=crossed.from_tier,
        )

    def end_attach(self, now_s: float) -> None:
        """The lease is held."""
        self._timeline = replace(self._timeline, attach_s=self._lap(now_s))

    def begin_process(self, now_s: float) -> None:
        """Config and canary are there; the engine is about to be forked."""
        self._timeline = replace(self._timeline, prepare_s=self._lap(now_s))

    def end_process(self, now_s: float) -> None:
        """The engine was forked."""
        self._timeline = replace(self._timeline, process_s=self._lap(now_s))

    def finish(self, now_s: float, ready: EngineReady) -> StartTimeline:
        """Return the timeline of a start that ended in `ready`."""
        return replace(
            self._timeline,
            attach_s=self._timeline.attach_s + ready.attach_s,
            build_s=ready.build_s,
            first_token_s=ready.first_token_s,
            total_s=now_s - self.asked_s,
        )

    def _lap(self, now_s: float) -> float:
        spent_s, self._mark_s = now_s - self._mark_s, now_s
        return spent_s
