"""Serves the attach protocol (docs/protocol.md): leases on pool memory over a Unix socket.

A lease is its connection. The kernel closes a dead holder's connection, and that ends the lease,
however the holder died. A lease on a model that is still being loaded tells its holder how far the
load is; it becomes a lease on the resident model in the step that makes the model visible.
"""

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Callable
from pathlib import Path

from gearfall.core.errors import GearfallError, InvalidRequest
from gearfall.core.ids import ModelName
from gearfall.infra.memory.attach_protocol import (
    AttachReply,
    FillNews,
    pack_frame,
    read_request,
    write_frame,
)
from services.store.loading.filling import Filling
from services.store.tiers.pool import Pool, Resident

_HANDSHAKE_TIMEOUT_S = 5.0
_MAX_SOCKET_PATH_BYTES = 107
_BACKLOG = 128
_log = logging.getLogger(__name__)


class AttachServer:
    """Owns the socket and one task for each holder."""

    def __init__(
        self,
        pool: Pool,
        directory: Path,
        find_filling: Callable[[ModelName], Filling | None] = lambda _: None,
    ) -> None:
        """`directory` becomes private (0700) and holds nothing but the socket.

        `find_filling` returns the memory that a load of a model fills right now.
        """
        self._pool = pool
        self._find_filling = find_filling
        self._directory = directory
        self.path = directory / "attach.sock"
        self._listener: socket.socket | None = None

    def open(self) -> None:
        """Start to listen. Raises InvalidRequest when the path is too long for a socket."""
        if len(os.fsencode(self.path)) > _MAX_SOCKET_PATH_BYTES:
            raise InvalidRequest(
                f"{self.path} is too long for a Unix socket: set --attach-dir to a shorter path"
            )
        self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._directory.chmod(0o700)
        # The data directory's lock is held: a socket found here is a dead store's.
        self.path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(os.fspath(self.path))
        self._listener.listen(_BACKLOG)
        self._listener.setblocking(False)

    async def run(self) -> None:
        """Accept holders until cancelled; then every lease ends."""
        assert self._listener is not None
        loop = asyncio.get_running_loop()
        async with asyncio.TaskGroup() as holders:
            while True:
                connection, _ = await loop.sock_accept(self._listener)
                holders.create_task(self._hold(connection))

    def close(self) -> None:
        """Stop listening and remove the socket. Idempotent."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None
            self.path.unlink(missing_ok=True)

    async def _hold(self, connection: socket.socket) -> None:
        with connection:
            connection.setblocking(False)
            try:
                await self._serve(connection)
            except (OSError, EOFError, TimeoutError) as error:
                _log.info("attach connection ended early", extra={"error": repr(error)})
            except Exception:
                _log.exception("unexpected error on an attach connection")

    async def _serve(self, connection: socket.socket) -> None:
        try:
            async with asyncio.timeout(_HANDSHAKE_TIMEOUT_S):
                request = await read_request(connection)
            model = ModelName(request.model)
            filling = self._find_filling(model) if request.accepts_filling else None
            if filling is not None and filling.digest == request.digest:
                await self._serve_filling(connection, filling, request.holder)
                return
            resident = self._pool.lease(model, request.digest, request.holder)
        except GearfallError as error:
            await self._refuse(connection, error)
            return
        try:
            async with asyncio.timeout(_HANDSHAKE_TIMEOUT_S):
                await _hand_out(connection, resident)
            _log.info("lease taken", extra={"model": model, "holder": request.holder})
            await _wait_end(connection)
        finally:
            self._pool.release(model, request.holder)
            _log.info("lease ended", extra={"model": model, "holder": request.holder})

    async def _serve_filling(
        self, connection: socket.socket, filling: Filling, holder: str
    ) -> None:
        """Hand out memory that is being filled, and say how far it is until the load has ended."""
        filling.hold(holder)
        fields = {"model": filling.model, "holder": holder}
        try:
            async with asyncio.timeout(_HANDSHAKE_TIMEOUT_S):
                await _hand_out(connection, filling)
            _log.info("lease taken while the model is loaded", extra=fields)
            await _tell(connection, filling)
            await _wait_end(connection)
        finally:
            filling.release(holder)
            if filling.is_resident:
                self._pool.release(filling.model, holder)
            _log.info("lease ended", extra=fields)

    async def _refuse(self, connection: socket.socket, error: GearfallError) -> None:
        if isinstance(error, InvalidRequest):
            _log.warning("malformed attach request", extra={"error": error.message})
        async with asyncio.timeout(_HANDSHAKE_TIMEOUT_S):
            await write_frame(connection, AttachReply.refusal(error))


async def _hand_out(connection: socket.socket, held: Resident | Filling) -> None:
    is_filling = isinstance(held, Filling)
    reply = AttachReply(len(held.manifest_json), held.partition_sizes, is_filling=is_filling)
    frame = pack_frame(reply)
    # The send buffer of a new connection is empty, so that this never blocks; the descriptors
    # travel with the first byte.
    sent = socket.send_fds(connection, [frame], held.partition_fds)
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(connection, frame[sent:] + held.manifest_json)


async def _tell(connection: socket.socket, filling: Filling) -> None:
    """Send how far the load is, and how it ended."""
    async for verified in filling.flight.follow():
        await write_frame(connection, FillNews(verified))
    try:
        await filling.flight.wait()
    except GearfallError as error:
        await write_frame(connection, FillNews.failure(error))
    else:
        await write_frame(connection, FillNews(filling.partition_sizes, is_done=True))


async def _wait_end(connection: socket.socket) -> None:
    """Return when the holder closed its end or died; what it sends is ignored."""
    loop = asyncio.get_running_loop()
    with contextlib.suppress(ConnectionError):
        while await loop.sock_recv(connection, 4096):
            pass
