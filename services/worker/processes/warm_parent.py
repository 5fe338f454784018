"""The worker's end of one zygote process: starts it, asks it for forks, hears of exits.

The worker imported gRPC and so never forks; it starts the zygote as a new program.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import msgspec

from gearfall.core.errors import Unavailable
from gearfall.infra.local.own_programs import python_path
from services.worker.engine_link.frames import FrameDecoder, send_header
from services.worker.processes.zygote_messages import (
    EngineExited,
    EngineForked,
    ForkEngine,
    ForkFailed,
    PrepareEngine,
    WorkerRequest,
    ZygoteMessage,
    ZygoteReady,
)

_LOG = logging.getLogger(__name__)
_READ_BYTES = 1 << 16
_DECODER = msgspec.msgpack.Decoder(ZygoteMessage)

START_TIMEOUT_S = 120.0
"""Importing torch and transformers takes seconds, on a cold disk many."""
FORK_TIMEOUT_S = 10.0
STOP_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class ExitStatus:
    """How an engine process ended."""

    exit_code: int
    """0 to 255; 0 when a signal ended it."""
    signal: int
    """Signal that ended it, or 0."""

    def __str__(self) -> str:
        """Return it in words."""
        if self.signal:
            return f"killed by {signal.Signals(self.signal).name}"
        return f"exit code {self.exit_code}"


KILLED = ExitStatus(exit_code=0, signal=signal.SIGKILL)
"""What becomes of engines whose zygote dies: the kernel kills them."""


@dataclass(frozen=True, slots=True)
class ForkedEngine:
    """A fresh engine process, before it was told what to build."""

    pid: int
    exited: asyncio.Future[ExitStatus]


class WarmParent:
    """One running zygote process. It is useless once `is_dead`; start another."""

    def __init__(self, process: subprocess.Popen[bytes], control: socket.socket) -> None:
        self._process = process
        self._control = control
        self._ready: asyncio.Future[ZygoteReady] = asyncio.get_running_loop().create_future()
        self._forks: dict[int, asyncio.Future[ForkedEngine]] = {}
        self._exits: dict[int, asyncio.Future[ExitStatus]] = {}
        self._requests = 0
        self._sending = asyncio.Lock()
        self.reader = asyncio.create_task(self._read())
        """Ends when the zygote is gone and reaped."""

    @classmethod
    async def start(cls) -> Self:
        """Start a zygote and return when it is warm. Raises Unavailable when it is not in time."""
        ours, theirs = socket.socketpair()
        with theirs:
            process = _start_process(theirs)
        ours.setblocking(False)
        parent = cls(process, ours)
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                ready = await asyncio.shield(parent._ready)
        except TimeoutError:
            await parent.stop()
            raise Unavailable(f"the zygote was not warm after {START_TIMEOUT_S:.0f} s") from None
        except BaseException:
            await parent.stop()
            raise
        _LOG.info("zygote is warm", extra={"pid": ready.pid, "import_s": ready.import_s})
        return parent

    @property
    def pid(self) -> int:
        """Process id of the zygote."""
        return self._process.pid

    @property
    def is_dead(self) -> bool:
        """Whether it is gone, and its engines with it."""
        return self.reader.done()

    async def fork(self, engine_socket: socket.socket) -> ForkedEngine:
        """Fork an engine that speaks on a copy of `engine_socket`. Raises Unavailable."""
        self._requests += 1
        request = self._requests
        future: asyncio.Future[ForkedEngine] = asyncio.get_running_loop().create_future()
        self._forks[request] = future
        try:
            async with asyncio.timeout(FORK_TIMEOUT_S):
                await self._send(ForkEngine(request), [engine_socket.fileno()])
                return await future
        except OSError as error:
            raise Unavailable(f"the zygote did not fork: {error or 'no answer'}") from error
        finally:
            self._forks.pop(request, None)

    async def prepare(self) -> None:
        """Have it make the next fork now, if it is there."""
        with contextlib.suppress(OSError):
            await self._send(PrepareEngine(), [])

    async def stop(self) -> None:
        """End the zygote and all its engines. Idempotent."""
        with contextlib.suppress(OSError):
            self._control.shutdown(socket.SHUT_RDWR)
        await asyncio.wait({self.reader}, timeout=STOP_TIMEOUT_S)
        if not self.reader.done():
            self._process.kill()
            await self.reader

    async def _send(self, message: WorkerRequest, descriptors: Sequence[int]) -> None:
        body = msgspec.msgpack.encode(message)
        async with self._sending:
            send_header(self._control, body, descriptors)
            await asyncio.get_running_loop().sock_sendall(self._control, body)

    async def _read(self) -> None:
        loop = asyncio.get_running_loop()
        decoder = FrameDecoder()
        try:
            while data := await loop.sock_recv(self._control, _READ_BYTES):
                for body in decoder.feed(data):
                    self._handle(_DECODER.decode(body))
        except OSError as error:
            _LOG.warning("zygote connection broke", extra={"error": str(error)})
        finally:
            self._control.close()
            await self._reap()
            self._fail_waiting()

    def _handle(self, message: ZygoteMessage) -> None:
        match message:
            case ZygoteReady():
                self._ready.set_result(message)
            case EngineForked(request=request, pid=pid):
                self._note_fork(request, pid)
            case ForkFailed(request=request, error=error):
                if request in self._forks:
                    self._forks[request].set_exception(Unavailable(error))
            case EngineExited(pid=pid):
                self._exits.pop(pid).set_result(ExitStatus(message.exit_code, message.signal))

    def _note_fork(self, request: int, pid: int) -> None:
        exited: asyncio.Future[ExitStatus] = asyncio.get_running_loop().create_future()
        self._exits[pid] = exited
        waiting = self._forks.get(request)
        if waiting is not None and not waiting.done():
            waiting.set_result(ForkedEngine(pid, exited))

    async def _reap(self) -> None:
        """Wait for the process: it ends by itself when the control socket is closed."""
        try:
            await asyncio.to_thread(self._process.wait, STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            await asyncio.to_thread(self._process.wait)

    def _fail_waiting(self) -> None:
        died = Unavailable(f"the zygote ended with status {self._process.returncode}")
        if not self._ready.done():
            self._ready.set_exception(died)
        for fork in self._forks.values():
            if not fork.done():
                fork.set_exception(died)
        for exited in self._exits.values():
            exited.set_result(KILLED)
        self._exits.clear()


def _start_process(control: socket.socket) -> subprocess.Popen[bytes]:
    command = [
        sys.executable,
        "-m",
        "services.worker.processes.zygote",
        "--fd",
        str(control.fileno()),
    ]
    return subprocess.Popen(  # noqa: S603 (our own program)
        command,
        pass_fds=(control.fileno(),),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": python_path()},
    )
