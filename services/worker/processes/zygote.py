"""The warm parent: imports torch and transformers once, then forks one engine process per request.

`python -m services.worker.processes.zygote --fd N` speaks `zygote_messages` on descriptor N. It
never imports gRPC, runs nothing in parallel (a parent that did would break its children), reaps
its children, and ends, its children with it, when its socket closes. When it is told that there is
time, it forks a process ahead of need, which rehearses and waits to become the next engine.
"""

import argparse
import contextlib
import ctypes
import gc
import importlib
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import NoReturn

import msgspec

from gearfall.infra.history_log import close_history, open_history
from services.worker.engine_link.frames import encode_frame, receive_frame
from services.worker.processes.spare_engine import SpareEngine, wait_for_engine_socket
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

_PR_SET_PDEATHSIG = 1
_DECODER: msgspec.msgpack.Decoder[WorkerRequest] = msgspec.msgpack.Decoder(WorkerRequest)

WARM_MODULES = (
    "numpy.random",
    "torch",
    "transformers.models.auto.modeling_auto",
    "transformers.modeling_utils",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen2.modeling_qwen2",
    "transformers.models.qwen3.modeling_qwen3",
    "transformers.models.mistral.modeling_mistral",
    "transformers.models.gpt2.modeling_gpt2",
    "services.worker.engine.main",
    "services.worker.engine.starting.rehearsal",
)
"""Imported before the first fork. Another family's module is imported by its own engine."""


class Zygote:
    """Answers fork requests and reports exits on one control socket."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._children: set[int] = set()
        self._unannounced: set[int] = set()
        """Children that the worker knows nothing of: the spare, and spares that died."""
        self._spare: SpareEngine | None = None
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def run(self) -> None:
        """Serve until the control socket closes."""
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        poller = select.poll()
        poller.register(self._control, select.POLLIN)
        poller.register(self._wake_read, select.POLLIN)
        while True:
            ready = {descriptor for descriptor, _ in poller.poll()}
            if self._wake_read in ready:
                self._drain_wakeups()
                self._reap()
            if self._control.fileno() in ready and not self._serve_request():
                return

    def _drain_wakeups(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while os.read(self._wake_read, 4096):
                pass

    def _reap(self) -> None:
        for pid in tuple(self._children):
            reaped, status = os.waitpid(pid, os.WNOHANG)
            if reaped:
                self._children.discard(pid)
                self._note_exit(pid, status)

    def _serve_request(self) -> bool:
        try:
            frame = receive_frame(self._control)
        except ConnectionResetError:
            frame = None
        if frame is None:
            return False
        body, descriptors = frame
        match _DECODER.decode(body):
            case ForkEngine(request=request):
                (engine_descriptor,) = descriptors
                with socket.socket(fileno=engine_descriptor) as engine_socket:
                    self._give_engine(request, engine_socket)
            case PrepareEngine():
                self._prepare()
        return True

    def _give_engine(self, request: int, engine_socket: socket.socket) -> None:
        """Answer with the spare, or where there is none with a fresh fork."""
        spare, self._spare = self._spare, None
        if spare is not None and spare.hand(engine_socket):
            self._unannounced.discard(spare.pid)
            self._send(EngineForked(request, spare.pid))
        else:
            self._fork(request, engine_socket)

    def _prepare(self) -> None:
        """Fork a spare unless there is one; without one the next engine is forked when needed."""
        if self._spare is not None:
            return
        parent = os.getpid()
        with contextlib.suppress(OSError):
            self._spare = SpareEngine.fork(
                lambda control: self._become_engine(parent, lambda: _rehearsed(control))
            )
            self._children.add(self._spare.pid)
            self._unannounced.add(self._spare.pid)

    def _note_exit(self, pid: int, status: int) -> None:
        if pid not in self._unannounced:
            self._send(_exit_message(pid, status))
            return
        self._unannounced.discard(pid)
        if self._spare is not None and self._spare.pid == pid:
            self._spare.close()
            self._spare = None

    def _fork(self, request: int, engine_socket: socket.socket) -> None:
        parent = os.getpid()
        try:
            pid = os.fork()
        except OSError as error:
            self._send(ForkFailed(request, f"fork failed: {error}"))
            return
        if pid == 0:
            self._become_engine(parent, lambda: engine_socket)
        self._children.add(pid)
        self._send(EngineForked(request, pid))

    def _become_engine(
        self, parent: int, find_socket: Callable[[], socket.socket | None]
    ) -> NoReturn:
        """Run the engine in the child and leave it without ever returning to the parent's stack."""
        status = 1
        try:
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGCHLD, signal.SIGTERM):
                signal.signal(number, signal.SIG_DFL)
            die_with_parent(parent)
            self._control.close()
            os.close(self._wake_read)
            os.close(self._wake_write)
            if self._spare is not None:
                self._spare.close()
            from services.worker.engine.main import engine_main

            engine_socket = find_socket()
            status = 0 if engine_socket is None else engine_main(engine_socket)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stderr.flush()
            os._exit(status)

    def _send(self, message: ZygoteMessage) -> None:
        with contextlib.suppress(BrokenPipeError):  # the worker is gone: run() ends at once
            self._control.sendall(encode_frame(msgspec.msgpack.encode(message)))


def _rehearsed(control: socket.socket) -> socket.socket | None:
    """Do what every engine does first, then wait for the socket of the one to become."""
    from services.worker.engine.starting.rehearsal import rehearse

    rehearse()
    return wait_for_engine_socket(control)


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent ends, also when it has ended already."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:
        os._exit(1)


def warm_up() -> None:
    """Import what every engine needs, with one torch thread; freeze it against the collector."""
    for name in WARM_MODULES:
        importlib.import_module(name)
    import torch

    from services.worker.engine.model.weights import warm_renamings

    torch.set_num_threads(1)
    warm_renamings()
    gc.collect()
    gc.freeze()


def _exit_message(pid: int, status: int) -> EngineExited:
    code = os.waitstatus_to_exitcode(status)
    return EngineExited(pid, exit_code=max(code, 0), signal=max(-code, 0))


def main() -> None:
    """Warm up, announce it and serve."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fd", type=int, required=True, help="inherited Unix socket to serve on")
    control = socket.socket(fileno=parser.parse_args().fd)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the worker decides when a terminal interrupts
    started = time.perf_counter()
    warm_up()
    assert "grpc" not in sys.modules, "a process that imported gRPC must not fork"
    ready = ZygoteReady(pid=os.getpid(), import_s=time.perf_counter() - started)
    open_history("zygote", os.environ)
    control.sendall(encode_frame(msgspec.msgpack.encode(ready)))
    Zygote(control).run()
    close_history()


if __name__ == "__main__":
    main()
