"""Redis connections with nothing between a command and its reply: for what every job needs.

redis-py opens them (URL, TLS, login) and runs what is rare. Its way from a method to the socket and
back takes several times the processor time of packing a command and reading the reply, which is
most of what claiming and acknowledging a short job costs its worker.
"""

import asyncio
import hashlib
from collections import deque
from collections.abc import Sequence
from typing import Any, cast

import hiredis
from redis import exceptions

Part = str | bytes | int
Command = Sequence[Part]

_LOST = "the connection was lost"
_CLOSED = "the connections were closed"


class Wires:
    """Owner of the connections of one process, each used by one caller at a time."""

    def __init__(self, pool: Any) -> None:
        """`pool`: redis-py's, which makes connections."""
        self._pool = pool
        self._free: list[_Wire] = []
        self._all: set[_Wire] = set()
        self._is_closed = False

    async def call(self, *command: Part) -> Any:
        """Return the reply; raise the server's error as redis-py's, or its ConnectionError.

        Cancelling closes the connection: what the server does with the command is unknown then.
        """
        (reply,) = await self.call_all([command])
        if isinstance(reply, Exception):
            raise reply
        return reply

    async def call_all(self, commands: Sequence[Command]) -> Sequence[Any]:
        """Return all replies in order, the server's errors among them."""
        wire = await self._take()
        try:
            replies = [await reply for reply in wire.send(commands)]
        except BaseException:
            self._end(wire)
            raise
        self._free.append(wire)
        return replies

    async def script(self, text: str, keys: Sequence[str], arguments: Sequence[Part]) -> Any:
        """Run a Lua script, which the server keeps from its first run on."""
        parts = (len(keys), *keys, *arguments)
        try:
            return await self.call("EVALSHA", _sha1(text), *parts)
        except exceptions.NoScriptError:
            return await self.call("EVAL", text, *parts)

    def close(self) -> None:
        """Close all connections; who waits on one or asks for one gets a ConnectionError."""
        self._is_closed = True
        for wire in tuple(self._all):
            self._end(wire)

    async def _take(self) -> "_Wire":
        self._refuse_if_closed()
        while self._free:
            wire = self._free.pop()
            if wire.is_open:
                return wire
            self._end(wire)
        connection = self._pool.make_connection()
        try:
            await connection.connect()
            self._refuse_if_closed()
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
        wire = _Wire(connection)
        self._all.add(wire)
        return wire

    def _refuse_if_closed(self) -> None:
        if self._is_closed:
            raise exceptions.ConnectionError(_CLOSED)

    def _end(self, wire: "_Wire") -> None:
        self._all.discard(wire)
        if wire in self._free:
            self._free.remove(wire)
        wire.close()


class _Wire(asyncio.Protocol):
    """One connection, taken over from redis-py once it was greeted."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self._replies: deque[asyncio.Future[Any]] = deque()
        self._reader = hiredis.Reader(replyError=_error_of)
        # redis-py has no name for it.
        self._transport = cast("asyncio.Transport", connection._writer.transport)  # noqa: SLF001
        self._transport.set_protocol(self)
        self.is_open = not self._transport.is_closing()

    def send(self, commands: Sequence[Command]) -> Sequence["asyncio.Future[Any]"]:
        """Send commands at once; each future has its reply."""
        loop = asyncio.get_running_loop()
        replies = [loop.create_future() for _ in commands]
        self._replies.extend(replies)
        packed = (hiredis.pack_command(tuple(each)) for each in commands)  # type: ignore[arg-type]
        self._transport.write(b"".join(packed))
        return replies

    def close(self) -> None:
        """Close it now. Idempotent."""
        self.is_open = False
        self._transport.abort()
        self._connection._close()  # noqa: SLF001 - else it warns that nobody closed it
        self._fail()

    def data_received(self, data: bytes) -> None:
        """Give each reply to who waits for it, in order."""
        self._reader.feed(data)
        try:
            while (reply := self._reader.gets()) is not False:
                waiting = self._replies.popleft()
                if not waiting.done():
                    waiting.set_result(reply)
        except (hiredis.HiredisError, IndexError):
            self.close()  # not Redis's protocol, or a reply to nothing

    def connection_lost(self, error: Exception | None) -> None:
        """The server is gone."""
        del error
        self.is_open = False
        self._fail()

    def _fail(self) -> None:
        while self._replies:
            waiting = self._replies.popleft()
            if not waiting.done():
                waiting.set_exception(exceptions.ConnectionError(_LOST))
                waiting.exception()  # one of them is raised, nobody asks for the others'


def _error_of(text: str) -> exceptions.ResponseError:
    """Return the server's error, by the classes that `redis_errors` tells apart."""
    if text.startswith("NOSCRIPT"):
        return exceptions.NoScriptError(text)
    if text.startswith("OOM"):
        return exceptions.OutOfMemoryError(text)
    return exceptions.ResponseError(text)


def _sha1(text: str) -> str:
    return hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
