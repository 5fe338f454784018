"""One piece of work under way that any number of callers follow (single flight)."""

import asyncio
from collections.abc import AsyncIterator
from typing import Generic, TypeVar

Progress = TypeVar("Progress")
Result = TypeVar("Result")


class Flight(Generic[Progress, Result]):
    """Progress and, in the end, a result or an error. Used from the event loop's thread."""

    def __init__(self, start: Progress) -> None:
        """`start` is the progress before anything happened."""
        self.progress = start
        self._changed = asyncio.Event()
        self._result: Result | None = None
        self._error: Exception | None = None
        self.is_done = False

    def publish(self, progress: Progress) -> None:
        """Tell all followers; those who are slow see the latest only."""
        self.progress = progress
        self._wake()

    def succeed(self, result: Result) -> None:
        """End the flight with its result."""
        self._result = result
        self.is_done = True
        self._wake()

    def fail(self, error: Exception) -> None:
        """End the flight with an error, which every follower gets."""
        self._error = error
        self.is_done = True
        self._wake()

    async def follow(self) -> AsyncIterator[Progress]:
        """Yield the progress now and after each change until the flight has ended."""
        seen: Progress | None = None
        while True:
            changed = self._changed
            if self.progress is not seen:
                seen = self.progress
                yield seen
            elif self.is_done:
                return
            else:
                await changed.wait()

    async def wait(self) -> Result:
        """Return the result or raise the error once there is one."""
        async for _ in self.follow():
            pass
        if self._error is not None:
            # A fresh traceback for each follower: one exception object must not grow them all.
            raise self._error.with_traceback(None)
        assert self._result is not None
        return self._result

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
