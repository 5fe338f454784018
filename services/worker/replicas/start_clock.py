"""Measures the phases of one replica start."""

from dataclasses import dataclass, field, replace
from typing import Any

from gearfall.core.start_timeline import StartTimeline
from services.worker.engine_link.messages import EngineReady


@dataclass(slots=True)
class StartClock:
    """Collects one start's timeline; every time is passed in, monotonic, in seconds.

    An engine may start while its model is still being loaded. A phase then counts from the load's
    end on: what ran beside the load cost nothing, so that the phases add up to the whole start.
    """

    asked_s: float
    """When the start was asked for."""
    assigned_unix_s: float = 0.0
    """By the leader's clock; 0 for a start that no assignment asked for."""
    _mark_s: float = field(init=False)
    _loaded_s: float = field(init=False, default=0.0)
    """When the load ended that the engine was ahead of; 0 where it was not."""
    _timeline: StartTimeline = field(init=False, default_factory=StartTimeline)
    _spans: list[tuple[str, float, float]] = field(init=False, default_factory=list)
    """Phases as they ran: name, end, duration."""

    def __post_init__(self) -> None:
        self._mark_s = self.asked_s

    def begin_load(self, now_s: float) -> None:
        """Waiting is over; the store has said that it has the load in hand."""
        self._timeline = replace(self._timeline, queued_s=now_s - self.asked_s)
        self._mark_s = now_s

    def end_load(self, now_s: float, crossed: StartTimeline) -> None:
        """Take over the tiers that the store says were crossed."""
        if self._spans:
            self._loaded_s = now_s
        else:
            self._mark_s = now_s
        # The store's first word was on its way while its own time ran already.
        asked_in_s = max(0.0, now_s - crossed.total_s - self.asked_s)
        self._timeline = replace(
            self._timeline,
            queued_s=min(self._timeline.queued_s, asked_in_s),
            remote_s=crossed.remote_s,
            ssd_s=crossed.ssd_s,
            device_s=crossed.device_s,
            from_tier=crossed.from_tier,
            waited_s=crossed.queued_s,
        )

    def end_attach(self, now_s: float) -> None:
        """The lease is held."""
        self._end("attach_s", now_s)

    def begin_process(self, now_s: float) -> None:
        """Config and canary are there; the engine is about to be forked."""
        self._end("prepare_s", now_s)

    def end_process(self, now_s: float) -> None:
        """The engine was forked."""
        self._end("process_s", now_s)

    def finish(self, now_s: float, ready: EngineReady) -> StartTimeline:
        """Return the timeline of a start that ended in `ready`, its load having ended before."""
        end_s, spans = now_s, list(self._spans)
        for name in ("first_token_s", "build_s", "attach_s"):
            took_s = getattr(ready, name)
            spans.append((name, end_s, took_s))
            end_s -= took_s
        spent_s: dict[str, Any] = {}
        for name, end_s, took_s in spans:
            alone_s = min(took_s, max(0.0, end_s - self._loaded_s))
            spent_s[name] = spent_s.get(name, 0.0) + alone_s
        return replace(self._timeline, **spent_s, total_s=now_s - self.asked_s)

    def _end(self, name: str, now_s: float) -> None:
        self._spans.append((name, now_s, now_s - self._mark_s))
        self._mark_s = now_s
