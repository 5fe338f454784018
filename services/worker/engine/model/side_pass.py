"""What runs beside the steps: a thread of its own, which gives way to whoever else computes.

The thread runs a second decoder over the same weights and caches, on one core. Keys and values that
it computes have the bits that a step would have given them (`infra.kernels.cpu_kernels`), so a
sequence may go from one to the other at any token.
"""

import os
import queue
import threading
import time
from collections.abc import Callable
from collections.abc import Sequence as Many
from functools import partial

from gearfall.infra.kernels.cpu_decoder import Step
from services.worker.engine.batching.packing import PackedStep
from services.worker.engine.model.decoder import NativePass

NICENESS = 10
"""Of the thread: a tenth of a core that somebody wants, all of one that nobody wants."""


class SidePass:
    """Implements `services.worker.engine.beside.SidePass`. One caller; one step at a time."""

    def __init__(self, make: Callable[[], NativePass], touch: Callable[[Many[int]], None]) -> None:
        """`make` returns one that is nobody else's, when it is needed: starts do without.

        `touch` has the memory of blocks be there and mapped.
        """
        self._make = make
        self._touch = touch
        self._native: NativePass | None = None
        self._given: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._done = threading.Event()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._computed_s = 0.0

    def begin(self, step: PackedStep) -> None:
        """Compute a step that wants no logits and has no adapters; return at once."""
        assert not len(step.logit_rows)
        assert not step.adapters
        native = self._native = self._native or self._make()
        self._done.clear()
        # All that needs Python is done here: the thread must not hold the interpreter for long.
        self._give(partial(self._compute, native, native.prepare(step)))

    def touch(self, blocks: Many[int]) -> None:
        """Have the memory of these blocks be there and mapped; return at once."""
        self._give(partial(self._touch, blocks))

    def wait(self, timeout_s: float) -> float | None:
        """Return the seconds of processor time that the step took, None while it is computed.

        Waits so long for its end. Raises what the thread raised.
        """
        if not self._done.wait(timeout_s):
            return None
        if self._error is not None:
            raise self._error
        return self._computed_s

    def close(self) -> None:
        """End the thread, which finishes what it computes. Idempotent."""
        if self._thread is not None:
            self._given.put(None)
            self._thread.join()

    def _give(self, work: Callable[[], None]) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="side-pass", daemon=True)
            self._thread.start()
        self._given.put(work)

    def _run(self) -> None:
        os.nice(NICENESS)  # of this thread alone
        while (work := self._given.get()) is not None:
            try:
                work()
            except BaseException as error:
                self._error = error
                self._done.set()

    def _compute(self, native: NativePass, prepared: Step) -> None:
        begun_s = time.thread_time()
        native.run(prepared, threads=1)
        self._computed_s = time.thread_time() - begun_s
        self._done.set()
