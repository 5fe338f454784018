"""Keeps pool memory faulted in for the load that comes next (docs/decisions/0007).

One thread of low priority, started when there is something to do, faults fresh files in while
nothing loads. A load takes the file that serves it best, cut or lengthened to its size; nothing
that a load had ever comes back here. What is held lies in the pool's free room and gives way to it:

    held bytes <= free room + what the loads under way may still allocate

Only `allocate` makes more of the second, and it lets go of what is too much first.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence

from gearfall.core.ids import ModelName
from gearfall.infra.memory.free_memory import free_memory_bytes
from gearfall.infra.memory.native import PoolFile, StopSign
from services.store.tiers.pool_memory import Allocate
from services.store.tiers.spare_plan import LEAST_BYTES, choose_spare, plan_spares

SPARE_BYTES = 4 * 2**30
"""Most that is held unless somebody says so: what other programs of the machine can't have."""
REST_S = 0.5
"""After a load: an engine starts on what was loaded."""
RETRY_S = 30.0
"""After the machine had no memory to give."""
KEEP_FREE_BYTES = 512 * 2**20
"""Memory of the machine that is left to others: this is for convenience, they may need theirs."""
_STEP_BYTES = 64 * 2**20
_HUGE_PAGE_BYTES = 2 * 2**20
_NICENESS = 5
"""After the engines, but not last of all: a load that comes waits until one step has ended."""
_log = logging.getLogger(__name__)


class SpareMemory:
    """A `PoolAllocator` that has memory ready. Owns its files until a load takes them."""

    def __init__(
        self,
        limit_bytes: int,
        *,
        least_bytes: int = LEAST_BYTES,
        rest_s: float = REST_S,
        make: Allocate = PoolFile,
        free_memory: Callable[[], int] = free_memory_bytes,
    ) -> None:
        """Hold at most `limit_bytes`, in files of at least `least_bytes`."""
        self._limit_bytes = limit_bytes
        self._least_bytes = least_bytes
        self._rest_s = rest_s
        self._make = make
        self._free_memory = free_memory
        # What the pool said; guarded by the condition, which nobody holds for longer than that.
        self._changed = threading.Condition()
        self._free_bytes = 0
        self._owed: dict[ModelName, int] = {}
        self._models: tuple[tuple[int, ...], ...] = ()
        self._due_s = 0.0
        self._is_refused = False
        self._is_reported = False
        self._stop = StopSign()
        self._is_closed = False
        self._thread: threading.Thread | None = None
        # Held while files change; taken before the condition, never after it.
        self._files_lock = threading.Lock()
        self._files: list[PoolFile] = []

    @property
    def held_bytes(self) -> int:
        """Bytes of the files that wait for a load, allocated or about to be."""
        return sum(file.size_bytes for file in tuple(self._files))

    def begin(self, model: ModelName, size_bytes: int, free_bytes: int) -> None:
        """Stop faulting in: a load is about to allocate."""
        with self._changed:
            self._owed[model] = size_bytes
            self._free_bytes = free_bytes
            self._stop.show()

    def end(self, model: ModelName, free_bytes: int) -> None:
        """Go on, after a rest, when no load is left."""
        with self._changed:
            if self._owed.pop(model, None) is not None:
                self._is_refused = False
                self._due_s = time.monotonic() + self._rest_s
            self._free_bytes = free_bytes
            self._wake()

    def fit(self, free_bytes: int) -> None:
        """Have what fits into the free room."""
        with self._changed:
            self._free_bytes = free_bytes
            self._wake()

    def want(self, models: Iterable[Sequence[int]]) -> None:
        """Have what the largest of these models takes."""
        with self._changed:
            self._models = tuple(tuple(sizes) for sizes in models)
            self._wake()

    def allocate(self, model: ModelName, size_bytes: int) -> PoolFile:
        """Return the file that has most of this faulted in, or a new one; blocks for milliseconds.

        Raises OSError where the machine has no memory.
        """
        with self._files_lock:
            with self._changed:
                if model in self._owed:
                    self._owed[model] = max(0, self._owed[model] - size_bytes)
                room_bytes = self._free_bytes + sum(self._owed.values())
            index = choose_spare([(f.faulted_bytes, f.size_bytes) for f in self._files], size_bytes)
            file = None if index is None else self._files.pop(index)
            self._let_go(self.held_bytes - room_bytes)
        if file is None:
            return self._make(size_bytes)
        try:
            if file.size_bytes < size_bytes:
                file.resize(size_bytes)
        except BaseException:
            file.close()
            raise
        # Its tail, milliseconds to free, is cut while the first chunks are read.
        file.shorten(size_bytes)
        return file

    def wait_settled(self, timeout_s: float) -> bool:
        """Wait until all that is wanted is there or can't be had now; False after the timeout."""
        with self._changed:
            return self._changed.wait_for(self._is_settled, timeout_s)

    def close(self) -> None:
        """End the thread and free all of it. Idempotent."""
        with self._changed:
            self._is_closed = True
            self._stop.show()
            self._changed.notify_all()
            thread = self._thread
        if thread is not None:
            thread.join()
        with self._files_lock:
            self._let_go(self.held_bytes)

    def _wake(self) -> None:
        if self._thread is None and self._plan() and not self._is_closed:
            self._thread = threading.Thread(target=self._run, name="spare-memory", daemon=True)
            self._thread.start()
        self._changed.notify_all()

    def _plan(self) -> tuple[int, ...]:
        room_bytes = min(self._limit_bytes, self._free_bytes)
        return plan_spares(self._models, room_bytes, self._least_bytes)

    def _is_settled(self) -> bool:
        held = [(file.size_bytes, file.faulted_bytes) for file in self._files]
        is_there = held == [(size_bytes, size_bytes) for size_bytes in self._plan()]
        return not self._owed and (is_there or self._is_refused)

    def _run(self) -> None:
        os.nice(_NICENESS)
        while (stop := self._wait_due()) is not None:
            with self._files_lock:
                try:
                    self._step(stop)
                except OSError as error:
                    self._let_go(self.held_bytes)
                    self._postpone(str(error))

    def _wait_due(self) -> StopSign | None:
        """Return the sign of the next step once it is due, None at the end."""
        with self._changed:
            while not self._is_closed:
                self._is_refused = self._is_refused and time.monotonic() < self._due_s
                self._changed.notify_all()
                pause_s = None
                if not self._owed and (self._is_refused or not self._is_settled()):
                    pause_s = self._due_s - time.monotonic()
                    if pause_s <= 0:
                        self._stop = StopSign()
                        return self._stop
                self._changed.wait(pause_s)
            return None

    def _step(self, stop: StopSign) -> None:
        with self._changed:
            if self._owed:
                return  # a load has begun meanwhile: what is there is for it
            plan = self._plan()
        self._arrange(plan)
        for file in self._files:
            if file.faulted_bytes < file.size_bytes:
                free_bytes = self._free_memory()
                if free_bytes < KEEP_FREE_BYTES + _STEP_BYTES:
                    self._postpone(f"{free_bytes} bytes are free on this machine")
                else:
                    file.fault_in(_STEP_BYTES, stop)
                    self._is_reported = False
                return

    def _arrange(self, plan: Sequence[int]) -> None:
        """Have files of these sizes: the largest there is becomes the largest there shall be."""
        self._files.sort(key=lambda file: file.size_bytes, reverse=True)
        while len(self._files) > len(plan):
            self._files.pop().close()
        for index, size_bytes in enumerate(plan):
            if index == len(self._files):
                self._files.append(self._make(size_bytes))
            elif self._files[index].size_bytes != size_bytes:
                self._files[index].resize(size_bytes)

    def _let_go(self, excess_bytes: int) -> None:
        """Free at least this much, of the smallest files first."""
        for file in sorted(self._files, key=lambda file: file.size_bytes):
            if excess_bytes <= 0:
                return
            kept_bytes = (file.size_bytes - excess_bytes) // _HUGE_PAGE_BYTES * _HUGE_PAGE_BYTES
            excess_bytes -= file.size_bytes
            if kept_bytes >= max(self._least_bytes, 1):
                file.resize(kept_bytes)
            else:
                self._files.remove(file)
                file.close()

    def _postpone(self, reason: str) -> None:
        if not self._is_reported:
            _log.warning("no memory is kept ready for loads for now", extra={"reason": reason})
            self._is_reported = True
        with self._changed:
            self._is_refused = True
            self._due_s = time.monotonic() + RETRY_S
