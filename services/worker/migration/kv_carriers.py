"""The two ways for groups of keys and values: a socket of their own, else gRPC.

The socket costs fewer copies. Over gRPC the first message is the token that would open the socket,
each group is a message and so is each answer; nothing is serialised. A carrier blocks, and belongs
to one thread.
"""

import asyncio
import queue
import socket
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import grpc

from gearfall.core.errors import PermissionDenied
from gearfall.infra.net.grpc_channels import CHANNEL_OPTIONS
from gearfall.infra.net.grpc_errors import Context
from gearfall.infra.net.token_listener import TIMEOUT_S, TOKEN_BYTES, Guest, cut, receive
from services.worker.migration.cost import DataPath
from services.worker.migration.kv_groups import ANSWER
from services.worker.migration.kv_inlet import KvInlet

CONNECT_TIMEOUT_S = 1.0
"""The target took the offer a moment ago: a socket that is not open by then is barred."""
SERVICE = "gearfall.v1.WorkerBulk"
METHOD = "Carry"


class Carrier(Protocol):
    """An open way to the target's inlet. Everything but `cut` raises OSError when it breaks."""

    @property
    def path(self) -> DataPath:
        """Which way it is."""
        ...

    def send(self, header: bytes, content: bytes) -> None:
        """Send a group."""
        ...

    def hear(self) -> None:
        """Wait for the answer to one group."""
        ...

    def cut(self) -> None:
        """End it, from any thread."""
        ...

    def close(self) -> None:
        """Give back what it holds."""
        ...


Connect = Callable[[], Carrier]
"""Opens a carrier; raises OSError when it can't be opened."""


class SocketCarrier:
    """The bulk socket."""

    path = DataPath.KV

    def __init__(self, host: str, port: int, token: bytes) -> None:
        """Connect and show the token. Raises OSError when that can't be done."""
        self._socket = socket.create_connection((host, port), timeout=CONNECT_TIMEOUT_S)
        try:
            self._socket.settimeout(TIMEOUT_S)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._socket.sendall(token)
        except BaseException:
            self._socket.close()
            raise

    def send(self, header: bytes, content: bytes) -> None:
        """See `Carrier`."""
        self._socket.sendall(header)
        self._socket.sendall(content)

    def hear(self) -> None:
        """See `Carrier`."""
        try:
            receive(self._socket, ANSWER.size)
        except EOFError as error:
            raise ConnectionError("the target took no more") from error

    def cut(self) -> None:
        """See `Carrier`."""
        cut(self._socket)

    def close(self) -> None:
        """See `Carrier`."""
        self._socket.close()


class StreamCarrier:
    """A call of gRPC's blocking kind, whose own threads send."""

    path = DataPath.KV_STREAM

    def __init__(self, address: str, token: bytes) -> None:
        """`address`: host:port of the target's gRPC service. Connects with the first group."""
        self._messages: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._messages.put(token)
        self._channel = grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
        call: grpc.StreamStreamMultiCallable[bytes, bytes]
        call = self._channel.stream_stream(f"/{SERVICE}/{METHOD}")
        self._answers = call(iter(self._messages.get, None))

    def send(self, header: bytes, content: bytes) -> None:
        """See `Carrier`."""
        self._messages.put(header + content)

    def hear(self) -> None:
        """See `Carrier`."""
        try:
            next(self._answers)
        except StopIteration as end:
            raise ConnectionError("the target took no more") from end
        except grpc.RpcError as error:
            raise ConnectionError(str(self._answers.details() or error)) from error

    def cut(self) -> None:
        """See `Carrier`."""
        self._answers.cancel()

    def close(self) -> None:
        """See `Carrier`."""
        self._messages.put(None)
        self._answers.cancel()
        self._channel.close()


class StreamDoor:
    """The target's end of `StreamCarrier`: hands groups to who expects the token."""

    def __init__(self, take: Callable[[bytes], Guest | None]) -> None:
        """`take` returns who waits for a token, once."""
        self._take = take

    def add_to(self, server: grpc.aio.Server) -> None:
        """Serve at `server`."""
        method: grpc.RpcMethodHandler[bytes, bytes]
        method = grpc.stream_stream_rpc_method_handler(self.carry)
        handler = grpc.method_handlers_generic_handler(SERVICE, {METHOD: method})
        server.add_generic_rpc_handlers((handler,))

    async def carry(
        self, messages: AsyncIterator[bytes], _context: Context
    ) -> AsyncIterator[bytes]:
        """Take groups in until the call ends. Raises PermissionDenied, or Unavailable."""
        token = await anext(aiter(messages), b"")
        inlet = self._take(token) if len(token) == TOKEN_BYTES else None
        if not isinstance(inlet, KvInlet):
            raise PermissionDenied("nobody expects what this call brings")
        loop = asyncio.get_running_loop()
        pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="kv-inlet")
        try:
            async for message in messages:
                yield await loop.run_in_executor(pool, inlet.take_message, message)
        finally:
            pool.shutdown(wait=False)
