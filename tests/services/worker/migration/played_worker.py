"""A worker of the migration's world: a real job board and engine, its process played."""

from collections import deque
from typing import TYPE_CHECKING, Any

from gearfall.core.ids import ModelName, WorkerId
from services.worker.engine.batching.batch import Batch
from services.worker.engine.batching.kv_blocks import KvBlocks
from services.worker.engine.engine import Engine
from services.worker.engine_link.messages import CancelJob, StepDone, SubmitJob
from services.worker.jobs.job_board import JobBoard
from tests.services.worker.counting_model import CountingModel
from tests.services.worker.migration.wires import Line, Stream

if TYPE_CHECKING:
    from tests.services.worker.migration.migration_world import World

MODEL = ModelName("counter")
BLOCKS = 24


class Process:
    """An engine and what is on its way to and from it; implements `ports.EngineProcess` in part."""

    kv_memory = None
    arithmetic = "exact"

    def __init__(self, site: "Site") -> None:
        self._site = site
        self.model = CountingModel(BLOCKS)
        self.blocks = KvBlocks(BLOCKS)
        self.batch = Batch(self.blocks, slots=2, step_tokens=20)
        self.engine = Engine(self.model, self.batch, context_tokens=200, clock=lambda: 0.0)
        self.inbox: deque[Any] = deque()
        self.out = Line(self._at_board)

    def send(self, message: object) -> None:
        self.inbox.append(message)

    def step(self) -> bool:
        """Take in the messages and compute a step; False when there was nothing to do."""
        had_messages = bool(self.inbox)
        while self.inbox:
            message = self.inbox.popleft()
            if isinstance(message, SubmitJob):
                self.engine.submit(message)
            elif isinstance(message, CancelJob):
                self.engine.cancel(message)
            else:
                self.engine.migrate(message)
        if self.engine.has_reports:
            self.out.put(self.engine.report())
        if self.engine.is_idle:
            return had_messages
        self.out.put(self.engine.step())
        self.engine.check()
        return True

    def _at_board(self, step: StepDone) -> None:
        self._site.board.push_step(step)

    def check_empty(self) -> None:
        assert self.batch.running == self.batch.waiting == 0
        assert not self.blocks._tables
        assert not self.blocks._pinned
        assert not self.blocks._left


class Site:
    """One worker."""

    def __init__(self, world: "World", name: str) -> None:
        self.world = world
        self.worker_id = WorkerId(name)
        self.is_alive = True
        self.stream: Stream | None = None
        self.board = JobBoard(self, self._open_stream, lambda _: world.is_router_alive)  # type: ignore[arg-type]
        self.obstacle = ""
        self.process = Process(self)
        self.board.attach_engine(MODEL, self.process)  # type: ignore[arg-type]

    def _open_stream(self, address: str, listener: object) -> Any:
        self.stream = Stream(self.world, self)
        return self.stream

    def acknowledge(self, model: ModelName, entry_ids: Any) -> None:
        """What the board asks of a `Settlement`."""
        for entry_id in entry_ids:
            self.world.queue_server.queues.get(model, {}).pop(entry_id, None)

    def restart_engine(self) -> None:
        """The engine dies; another one serves at once."""
        self.board.detach_engine(MODEL)
        self.process = Process(self)
        self.board.attach_engine(MODEL, self.process)  # type: ignore[arg-type]

    def check_empty(self) -> None:
        self.board.check()
        assert len(self.board._book) == 0
        assert not self.board._followed
        self.process.check_empty()
