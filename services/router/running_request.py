"""One admitted request: tasks of its choices on one side, batches of events on the other."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Protocol

from gearfall.core.errors import DeadlineExceeded, GearfallError, Internal
from gearfall.core.generation.job import FinishReason
from gearfall.core.generation.usage import StageReport, Usage
from gearfall.core.ids import RequestId
from services.router.answer_cache import Ticket
from services.router.answer_record import AnswerRecord
from services.router.gears.gear_board import PinnedGear
from services.router.generation import ChoiceEnd, Delta, GenerationEvent, Replace

_log = logging.getLogger(__name__)

EndObserver = Callable[["RunningRequest"], None]


class Run(Protocol):
    """What brings one choice to its end, or all of them."""

    async def run(self) -> None:
        """Emit events until then; raises what it failed with."""
        ...


class RunningRequest:
    """Iterate `batches()`, then `close()`; closing early stops the work within one decode step."""

    def __init__(
        self,
        request_id: RequestId,
        *,
        deployment: str,
        seed: int,
        choices: int,
        on_end: EndObserver,
    ) -> None:
        """`deployment`: the name that was asked for. `on_end` is called exactly once."""
        self.request_id = request_id
        self.deployment = deployment
        self.seed = seed
        self.choices = choices
        self.expected_start_s = 0.0
        """Of the first stage, at admission; 0 when it was ready."""
        self.gear: PinnedGear | None = None
        """That it was admitted with; None for a deployment without a plan."""
        self.error: GearfallError | None = None
        self.is_cancelled = False
        self.ends: dict[int, ChoiceEnd] = {}
        self.replaced: list[str] = []
        """Models whose text the client had and lost again, once each time."""
        self.started_s = time.perf_counter()
        """The loop's own clock is too coarse to measure with: uvloop's has whole milliseconds."""
        self.ticket: Ticket | None = None
        self.answer: AnswerRecord | None = None
        """Where the whole answer is wanted once it ended."""
        self._is_from_cache = False
        self.first_text_s: float | None = None
        """When the first text was released, on the same clock."""
        self._on_end = on_end
        self._outbox: list[GenerationEvent] = []
        self._wake = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._closed = asyncio.Event()

    @property
    def is_from_cache(self) -> bool:
        """Whether its answer was there when it came: it was not admitted and computes nothing."""
        return self._is_from_cache

    @property
    def cache(self) -> str:
        """`hit`, `miss`, `joined` while another request computes it; empty where none is kept."""
        if self.ticket is None:
            return ""
        if self.ticket.answer is not None:
            return "hit"
        return "miss" if self.ticket.is_leading or self.answer is not None else "joined"

    def take_ticket(self, ticket: Ticket | None) -> None:
        """Its place at the answer cache, before it starts."""
        self.ticket = ticket
        self._is_from_cache = ticket is not None and ticket.answer is not None

    def start(self, runs: Sequence[Run], deadline_s: float) -> None:
        """Start every choice; all end by `deadline_s` on the loop's clock.

        Nothing starts when the request was closed before, as while its prompt was read.
        """
        if self._closed.is_set():
            return
        loop = asyncio.get_running_loop()
        self._timer = loop.call_at(deadline_s, self._expire)
        self._tasks = [
            asyncio.create_task(self._run(run), name=f"choice-{self.request_id}") for run in runs
        ]

    def emit(self, event: GenerationEvent) -> None:
        """Queue an event for the client."""
        if self.answer is not None:
            self.answer.take(event)
        if isinstance(event, ChoiceEnd):
            self.ends[event.choice] = event
        elif isinstance(event, Replace):
            self.replaced.append(event.model)
        elif self.first_text_s is None and isinstance(event, Delta):
            self.first_text_s = time.perf_counter()
        self._outbox.append(event)
        self._wake.set()

    async def batches(self) -> AsyncIterator[list[GenerationEvent]]:
        """Yield what came since the last batch until all choices ended or the request is closed.

        Raises the request's error after what was released before it.
        """
        while True:
            await self._wake.wait()
            self._wake.clear()
            batch, self._outbox = self._outbox, []
            if batch:
                yield batch
            if self.error is not None:
                raise self.error
            if self._closed.is_set() and not self._outbox:
                return

    def cancel(self) -> None:
        """Stop the work; the choices that run end with finish reason CANCELLED."""
        self.is_cancelled = True
        for choice in range(self.choices):
            if choice not in self.ends:
                self.emit(_cancelled(choice))
        self.close()

    def fail(self, error: GearfallError) -> None:
        """End the request with `error`; the first one counts."""
        if self.error is None and len(self.ends) < self.choices:
            self.error = error
        self._wake.set()
        self.close()

    def close(self) -> None:
        """Stop what still runs and say that the request ended. Idempotent, never blocks."""
        if self._closed.is_set():
            return
        self._closed.set()
        if self._timer is not None:
            self._timer.cancel()
        for task in self._tasks:
            task.cancel()
        self._on_end(self)
        self._wake.set()

    async def wait_stopped(self) -> None:
        """Return when the request is closed and every choice's task has ended."""
        await self._closed.wait()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _expire(self) -> None:
        self.fail(DeadlineExceeded("the request's deadline passed before its answer was whole"))

    async def _run(self, run: Run) -> None:
        try:
            await run.run()
        except GearfallError as error:
            self.fail(error)
        except Exception as error:
            _log.exception("a choice failed", extra={"request_id": self.request_id})
            self.fail(Internal(f"internal error: {type(error).__name__}"))
        if len(self.ends) == self.choices:
            self.close()


def _cancelled(choice: int) -> ChoiceEnd:
    usage = Usage(0, 0, 0, 0, 0.0)
    stages: tuple[StageReport, ...] = ()
    return ChoiceEnd(choice, FinishReason.CANCELLED, "", stages, usage)
