"""Engine processes as the worker sees them, forked by a warm zygote that is replaced if it dies."""

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import AsyncIterator, Sequence

import msgspec

from gearfall.core.errors import CorruptCheckpoint, GearfallError, Internal, Unavailable
from services.worker.engine_link.frames import (
    FrameDecoder,
    encode_frame,
    receive_frame_async,
    send_header,
    writable,
)
from services.worker.engine_link.kv_memory import KvMemory
from services.worker.engine_link.messages import (
    EngineFailed,
    EngineMessage,
    EngineReady,
    StartEngine,
    StepDone,
    WorkerMessage,
)
from services.worker.processes.warm_parent import ExitStatus, ForkedEngine, WarmParent

__all__ = ["EngineProcess", "ExitStatus", "Zygote"]

_LOG = logging.getLogger(__name__)
_READ_BYTES = 1 << 18
_DECODER = msgspec.msgpack.Decoder(EngineMessage)
_EXIT_REPORT_TIMEOUT_S = 5.0


class EngineProcess:
    """One engine process; implements `services.worker.ports.EngineProcess`."""

    def __init__(self, forked: ForkedEngine, sock: socket.socket, start: bytes) -> None:
        """Take over `sock`, on which the header of `start` was sent."""
        self._forked = forked
        self._sock = sock
        self._unsent = [start]
        self._writer: asyncio.StreamWriter | None = None
        self._opened = asyncio.Event()
        self.kv_memory: KvMemory | None = None
        """Its KV cache, while it is there; None before it is ready and where it can't be shared."""
        self.arithmetic = ""
        """See `EngineReady.arithmetic`; empty before it is ready."""
        self._pidfd = _open_pidfd(forked.pid)
        self._ready: asyncio.Future[EngineReady] = asyncio.get_running_loop().create_future()
        self._ready.add_done_callback(_mark_retrieved)
        self._steps: asyncio.Queue[StepDone | None] = asyncio.Queue()
        self.task = asyncio.create_task(self._read())
        """Ends when the engine is gone and its exit was reported."""

    @property
    def pid(self) -> int:
        """Process id of the engine."""
        return self._forked.pid

    async def ready(self) -> EngineReady:
        """Return when the first forward pass has run.

        Raises CorruptCheckpoint or Unavailable with the engine's text when it can't start.
        """
        return await asyncio.shield(self._ready)

    def send(self, message: WorkerMessage) -> None:
        """Queue a message for the engine; dropped when the process is gone."""
        frame = encode_frame(msgspec.msgpack.encode(message))
        if self._writer is None:
            self._unsent.append(frame)
        elif not self._writer.is_closing():
            self._writer.write(frame)

    async def send_with(self, message: WorkerMessage, descriptors: Sequence[int]) -> None:
        """Send copies of `descriptors` beside a message, behind all that was sent before.

        Waits until the engine is ready and has taken the rest; dropped when the process is gone.
        """
        body = msgspec.msgpack.encode(message)
        await self._opened.wait()
        while self._writer is not None and not self._writer.is_closing():
            with contextlib.suppress(ConnectionError):
                await self._writer.drain()
            if self._writer.transport.get_write_buffer_size():
                await asyncio.sleep(0)  # bytes of this very turn, which are not drained yet
                continue
            try:
                # Nothing runs between the header and the body, so nothing comes between them.
                send_header(self._sock, body, descriptors)
            except BlockingIOError:
                await writable(self._sock)
                continue
            except OSError:
                return
            self._writer.write(body)
            return

    async def __aiter__(self) -> AsyncIterator[StepDone]:
        """Yield each step's result; end when the engine is gone. For one consumer."""
        while (step := await self._steps.get()) is not None:
            yield step

    async def wait_exit(self) -> ExitStatus:
        """Return how the process ended, once it has."""
        return await asyncio.shield(self._forked.exited)

    def kill(self) -> None:
        """Kill it now. Idempotent, and never hits another process that got the same id."""
        if self._pidfd is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    async def _read(self) -> None:
        try:
            if await self._read_first():
                await self._read_on()
        except (OSError, GearfallError, msgspec.DecodeError) as error:
            _LOG.warning("engine stream broke", extra={"pid": self.pid, "error": str(error)})
            self.kill()
        finally:
            self._close()
            self._steps.put_nowait(None)
            await self._conclude()

    async def _read_first(self) -> bool:
        """Have the engine start; False when it ends without a word.

        The first message is the one that descriptors come with, which no stream of asyncio's takes.
        """
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(self._sock, self._unsent.pop(0))
        frame = await receive_frame_async(self._sock)
        if frame is None:
            return False
        body, descriptors = frame
        message = _DECODER.decode(body)
        if isinstance(message, EngineReady) and message.kv_layout and descriptors:
            self.kv_memory = KvMemory(descriptors.pop(), message.kv_layout)
        for descriptor in descriptors:
            os.close(descriptor)
        self._handle(message)
        return True

    async def _read_on(self) -> None:
        reader, self._writer = await asyncio.open_unix_connection(sock=self._sock)
        # Draining waits for the last byte then: see send_with.
        self._writer.transport.set_write_buffer_limits(high=0)
        self._writer.writelines(self._unsent)
        self._opened.set()
        decoder = FrameDecoder()
        while data := await reader.read(_READ_BYTES):
            for body in decoder.feed(data):
                self._handle(_DECODER.decode(body))

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        else:
            self._sock.close()
        self._opened.set()

    def _handle(self, message: EngineMessage) -> None:
        match message:
            case StepDone():
                self._steps.put_nowait(message)
            case EngineReady():
                self.arithmetic = message.arithmetic
                self._ready.set_result(message)
            case EngineFailed(error=error, is_corrupt=is_corrupt):
                kind = CorruptCheckpoint if is_corrupt else Unavailable
                self._ready.set_exception(kind(error))

    async def _conclude(self) -> None:
        """Hear how the process ended, killing it where it outlives its socket."""
        try:
            async with asyncio.timeout(_EXIT_REPORT_TIMEOUT_S):
                await self.wait_exit()
        except TimeoutError:
            self.kill()
        status = await self.wait_exit()
        if not self._ready.done():
            self._ready.set_exception(Unavailable(f"the engine died while it started: {status}"))
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None
        self.kv_memory = None


class Zygote:
    """Forks engine processes; implements `services.worker.ports.EngineSpawner`.

    Owns one warm parent at a time. When that dies, its engines die with it (their iterators end)
    and another is warmed at once.
    """

    def __init__(self) -> None:
        self._parent: WarmParent | None = None
        self._warming = asyncio.Lock()
        self._tasks: set[asyncio.Task[object]] = set()
        self._is_stopping = False

    async def start(self) -> None:
        """Return when the first warm parent is up. Raises Unavailable when it can't be."""
        await self._warm()

    async def stop(self) -> None:
        """End the warm parent and every engine. Idempotent."""
        self._is_stopping = True
        async with self._warming:
            if self._parent is not None:
                await self._parent.stop()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def pid(self) -> int | None:
        """Process id of the warm parent, None when there is none."""
        return None if self._parent is None or self._parent.is_dead else self._parent.pid

    async def spawn(self, start: StartEngine, partition_fds: Sequence[int]) -> EngineProcess:
        """Fork an engine over `partition_fds`, which stay the caller's to close.

        Returns before the engine is ready: await its `ready()`. Raises Unavailable when no
        process can be had.
        """
        parent = await self._warm()
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                forked = await parent.fork(theirs)
            body = msgspec.msgpack.encode(start)
            ours.setblocking(False)
            send_header(ours, body, partition_fds)
        except OSError as error:
            ours.close()
            raise Unavailable(f"the engine could not be started: {error}") from error
        except BaseException:
            ours.close()
            raise
        engine = EngineProcess(forked, ours, body)
        self._own(engine.task)
        self._own(asyncio.create_task(_prepare_after(engine, parent)))
        return engine

    async def _warm(self) -> WarmParent:
        async with self._warming:
            if self._is_stopping:
                raise Unavailable("the worker is stopping")
            if self._parent is None or self._parent.is_dead:
                self._parent = await WarmParent.start()
                await self._parent.prepare()
                self._own(asyncio.create_task(self._rewarm_after(self._parent)))
            return self._parent

    async def _rewarm_after(self, parent: WarmParent) -> None:
        await asyncio.wait({parent.reader})
        if self._is_stopping:
            return
        _LOG.error("zygote died, warming another", extra={"pid": parent.pid})
        try:
            await self._warm()
        except Unavailable as error:
            _LOG.error("zygote can't be warmed", extra={"error": error.message})

    def _own(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def check(self) -> None:
        """Assert that a stopped zygote left nothing running."""
        if self._is_stopping and not self._tasks:
            assert self._parent is None or self._parent.is_dead


async def _prepare_after(engine: EngineProcess, parent: WarmParent) -> None:
    """Have the next fork made when this engine has started: until then it wants the cores."""
    with contextlib.suppress(GearfallError):
        await engine.ready()
    await parent.prepare()


def _open_pidfd(pid: int) -> int | None:
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    except OSError as error:
        raise Internal(f"no pidfd for engine {pid}: {error}") from error


def _mark_retrieved(future: asyncio.Future[EngineReady]) -> None:
    """Keep asyncio from warning about a failure that nobody waits for."""
    if not future.cancelled():
        future.exception()
