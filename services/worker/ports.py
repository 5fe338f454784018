"""What the worker host needs from outside: engine processes, the node's store and pool leases."""

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from gearfall.core.ids import ModelName
from gearfall.core.start_timeline import StartTimeline
from services.worker.engine_link.kv_memory import KvMemory
from services.worker.engine_link.messages import EngineReady, StartEngine, StepDone, WorkerMessage


class EngineProcess(Protocol):
    """One engine process. Iterating yields its StepDone messages and ends when it is gone.

    One without `kv_memory` (vLLM, or any on a GPU) refuses `HoldJob(by_kv=True)` with a REFUSED
    report: its jobs move by their tokens, which every kind of engine takes.
    """

    @property
    def pid(self) -> int:
        """Process id of the engine."""
        ...

    @property
    def kv_memory(self) -> KvMemory | None:
        """Its KV cache; None before it is ready, when it is gone, and where it can't be shared."""
        ...

    @property
    def arithmetic(self) -> str:
        """What its tokens' bits hang on, see `EngineReady.arithmetic`; empty before it is ready."""
        ...

    async def ready(self) -> EngineReady:
        """Return when it serves; raise CorruptCheckpoint or Unavailable when it can't start."""
        ...

    def send(self, message: WorkerMessage) -> None:
        """Queue a message for it; dropped when the process is gone."""
        ...

    async def send_with(self, message: WorkerMessage, descriptors: Sequence[int]) -> None:
        """Send copies of `descriptors` beside a message, behind all that was sent before.

        Dropped when the process is gone.
        """
        ...

    def __aiter__(self) -> AsyncIterator[StepDone]: ...

    async def wait_exit(self) -> object:
        """Return when the process is gone."""
        ...

    def kill(self) -> None:
        """Kill it now. Idempotent."""
        ...


class EngineSpawner(Protocol):
    """Starts engine processes (the zygote)."""

    async def spawn(self, start: StartEngine, partition_fds: Sequence[int]) -> EngineProcess:
        """Fork an engine that maps `partition_fds`, which stay the caller's to close."""
        ...


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model that its node's store holds verified in the pool."""

    digest: str
    attach_socket: str
    timeline: StartTimeline
    """Only the phases that the store crossed."""


@dataclass(frozen=True, slots=True)
class LeasableModel:
    """A model whose memory can be leased, though it may still be loaded."""

    digest: str
    attach_socket: str


OnLeasable = Callable[[LeasableModel], None]


class StoreClient(Protocol):
    """The store of the worker's own node; raises Unavailable when it can't be reached."""

    async def load_model(
        self,
        model: ModelName,
        on_leasable: OnLeasable = ...,
        *,
        wanted_unix_s: float = 0.0,
        on_begun: Callable[[], None] = ...,
    ) -> LoadedModel:
        """Bring the model to the pool; single flight at the store.

        `wanted_unix_s`: when it was assigned; what was assigned first is loaded first.
        `on_begun` is called once the store has the load in hand, before anything else;
        `on_leasable`, perhaps repeatedly, while the model is loaded and can be leased.
        """
        ...

    async def read_file(self, model: ModelName, file: str) -> bytes:
        """Return a small file kept with the checkpoint; raise NotFound where there is none."""
        ...

    async def read_canary(self, model: ModelName) -> bytes:
        """Return the model's canary as JSON, waiting while the store computes it."""
        ...


class PoolLease(Protocol):
    """A mapped hold on a resident checkpoint; the store keeps it while this is open."""

    @property
    def manifest_json(self) -> bytes:
        """The verified manifest's bytes."""
        ...

    @property
    def partition_fds(self) -> Sequence[int]:
        """One descriptor per partition, owned by the lease."""
        ...

    @property
    def news_fd(self) -> int | None:
        """Where the store tells how far the load is; None when the model is resident."""
        ...

    def close(self) -> None:
        """Give it back. Idempotent."""
        ...


class LeaseTaker(Protocol):
    """Takes a lease at a store's attach socket."""

    async def __call__(
        self,
        socket_path: str,
        model: str,
        digest: str,
        holder: str,
        *,
        accepts_filling: bool = False,
    ) -> PoolLease:
        """Take one, if so told on a model that is still being loaded.

        Raise NotFound, CorruptCheckpoint or Unavailable when it can't be had.
        """
        ...
