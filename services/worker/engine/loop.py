"""The engine process's main loop: commands between steps, one result message per step."""

from services.worker.engine.engine import Engine
from services.worker.engine.stream import EngineStream
from services.worker.engine_link.messages import (
    AttachAdapter,
    CancelJob,
    DropAdapter,
    FeedJob,
    FreezeJob,
    HoldJob,
    PinJob,
    ProbeEngine,
    ReleaseJob,
    StopEngine,
    SubmitJob,
    ThawJob,
    UnpinJob,
    WorkerMessage,
)


class EngineLoop:
    """Feeds an engine from its stream until it is told to stop or the worker is gone."""

    def __init__(self, engine: Engine, stream: EngineStream) -> None:
        self._engine = engine
        self._stream = stream
        self._is_stopping = False
        self._is_probed = False

    def run(self) -> None:
        """Step while there is work, sleep in the kernel while there is none."""
        while True:
            wait = self._engine.is_idle or self._stream.is_choked
            for message in self._stream.receive(wait=wait):
                self._handle(message)
            if self._is_stopping or self._stream.is_closed:
                break
            self._engine.look_beside()
            if self._engine.has_reports and not self._stream.is_choked:
                self._is_probed = False
                self._stream.send(self._engine.report())
            is_due = self._is_probed or not self._engine.is_idle
            if is_due and not self._stream.is_choked:
                self._is_probed = False
                self._stream.send(self._engine.step())
        self._stream.drain()

    def _handle(self, message: WorkerMessage) -> None:
        match message:
            case SubmitJob():
                self._engine.submit(message)
            case CancelJob():
                self._engine.cancel(message)
            case (
                HoldJob()
                | FeedJob()
                | ReleaseJob()
                | PinJob()
                | FreezeJob()
                | ThawJob()
                | UnpinJob()
            ):
                self._engine.migrate(message)
            case AttachAdapter():
                self._engine.attach(message, self._stream.take_descriptors())
            case DropAdapter():
                self._engine.drop(message)
            case ProbeEngine():
                self._is_probed = True
            case StopEngine():
                self._is_stopping = True
            case _:
                raise AssertionError(f"{type(message).__name__} came to a running engine")
