"""The LoRA adapters of one engine: attached when the worker says so, dropped when unused. Pure.

    unknown --attach--> attached --drop--> leaving --no job runs with it--> unknown
       |                   ^                  |
       |                   +----- attach -----+
       +--attach failed--> failed --attach--> ...

A job whose adapter is not attached ends with an error that says why.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from gearfall.core.errors import GearfallError, InvalidRequest
from services.worker.engine_link.messages import AdapterReport, AttachAdapter, DropAdapter

_MAX_FAILURES = 256
"""Failed adapters whose reason is kept."""


class AdapterHost(Protocol):
    """The model that adapters are attached to."""

    def attach(self, message: AttachAdapter, descriptors: Sequence[int]) -> None:
        """Map and attach an adapter, whose descriptors it closes. Raises GearfallError."""
        ...

    def drop(self, adapter: str) -> None:
        """Let go of an attached adapter that no job runs with."""
        ...


class AdapterJobs:
    """Owner of what is attached, and of what the worker is to be told about it."""

    def __init__(self, host: AdapterHost, is_used: Callable[[str], bool]) -> None:
        """`is_used`: whether a job here runs with an adapter."""
        self._host = host
        self._is_used = is_used
        self._attached: set[str] = set()
        self._leaving: set[str] = set()
        self._failures: dict[str, str] = {}
        self._reports: list[AdapterReport] = []

    @property
    def has_reports(self) -> bool:
        """Whether something is to be reported."""
        return bool(self._reports)

    def attach(self, message: AttachAdapter, descriptors: Sequence[int]) -> None:
        """Attach an adapter; the next step's result reports it."""
        error = ""
        try:
            self._host.attach(message, descriptors)
        except GearfallError as failed:
            error = f"adapter {message.name!r} can't be used: {failed.message}"
            self._note_failure(message.adapter, error)
        else:
            self._attached.add(message.adapter)
            self._leaving.discard(message.adapter)
            self._failures.pop(message.adapter, None)
        self._reports.append(AdapterReport(message.adapter, error))

    def drop(self, message: DropAdapter) -> None:
        """Drop an adapter now, or as soon as its last job has ended. Idempotent."""
        if message.adapter in self._attached:
            self._leaving.add(message.adapter)
            self.settle()

    def settle(self) -> None:
        """Drop what is to go and is used no more; to be called when jobs have ended."""
        for adapter in [each for each in self._leaving if not self._is_used(each)]:
            self._leaving.discard(adapter)
            self._attached.discard(adapter)
            self._host.drop(adapter)

    def find_fault(self, adapter: str) -> str:
        """Return why no new job can run with `adapter`; empty if it can, or wants none."""
        if not adapter or adapter in self._attached:
            return ""
        return self._failures.get(adapter, "the job's adapter is not attached to this engine")

    def take_reports(self) -> tuple[AdapterReport, ...]:
        """Return what is to be reported."""
        reports, self._reports = self._reports, []
        return tuple(reports)

    def check(self) -> None:
        """Assert that only what is attached leaves, and that nothing is both there and failed."""
        assert self._leaving <= self._attached
        assert not self._attached & self._failures.keys()

    def _note_failure(self, adapter: str, error: str) -> None:
        if adapter in self._attached:
            return
        self._failures.pop(adapter, None)
        self._failures[adapter] = error
        while len(self._failures) > _MAX_FAILURES:
            del self._failures[next(iter(self._failures))]


class NoAdapters:
    """The host of a model that takes none."""

    def attach(self, message: AttachAdapter, descriptors: Sequence[int]) -> None:
        """Refuse it."""
        del descriptors
        raise InvalidRequest(f"this model takes no adapter such as {message.name!r}")

    def drop(self, adapter: str) -> None:
        """Nothing is ever attached."""
