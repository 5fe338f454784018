"""Keys and values over plain TCP, from one engine's memory into another's, beside the gRPC call.

The source connects to the target's port and sends a one-time token of 32 bytes, then groups of
blocks: first and last token (end exclusive) and xxh3_64 of the bytes, then the bytes, block by
block in the order of `KvLayout.ranges`. The target answers each group that lies in its blocks with
its end; so many groups as the window allows may be unanswered. Blocking: each end has a thread.
"""

import contextlib
import queue
import secrets
import socket
import struct
import threading
from collections.abc import Callable, Iterator

import xxhash

from gearfall.core.errors import GearfallError, Unavailable
from gearfall.pb import worker_pb2 as pb
from services.worker.engine_link.kv_memory import KvMemory

TOKEN_BYTES = 32
GROUP_BYTES = 1 << 20
"""About as many bytes as one group has; at least one block."""
WINDOW_GROUPS = 8
TIMEOUT_S = 10.0
_HEADER = struct.Struct("<IIQ")
_ANSWER = struct.Struct("<I")

Groups = Iterator[tuple[int, int]]


def kv_shape(memory: KvMemory) -> pb.KvShape:
    """Return what two caches must have in common for their blocks to be interchangeable."""
    layout = memory.layout
    return pb.KvShape(
        block_tokens=layout.block_tokens,
        layer_block_bytes=[layer.block_bytes for layer in layout.layers],
    )


def groups_of(start: int, end: int, memory: KvMemory) -> Groups:
    """Part tokens [start, end) into groups of whole blocks; the last block may be cut short."""
    layout = memory.layout
    assert start % layout.block_tokens == 0
    size = max(1, GROUP_BYTES // layout.block_bytes) * layout.block_tokens
    for first in range(start, end, size):
        yield first, min(first + size, end)


def _parts(start: int, end: int, block_tokens: int) -> Iterator[tuple[int, int]]:
    """Yield (place in the block table, tokens in that block) of tokens [start, end)."""
    for first in range(start, end, block_tokens):
        yield first // block_tokens, min(block_tokens, end - first)


class KvInlet:
    """What one migration writes into a held job's blocks. Shared by the loop and one thread."""

    def __init__(
        self,
        memory: KvMemory,
        on_kv: Callable[[int], None],
        on_failure: Callable[[str], None],
    ) -> None:
        """`on_kv` hears how far the blocks are filled; both are called on the inlet's thread."""
        self._memory = memory
        self._on_kv = on_kv
        self._on_failure = on_failure
        self._changed = threading.Condition()
        self._table: tuple[int, ...] = ()
        self._written = 0
        self._is_closed = False
        self._connection: socket.socket | None = None

    def open(self, block_table: tuple[int, ...], written: int) -> None:
        """The blocks are these, and open from token `written` on: what is before may be shared."""
        with self._changed:
            self._table, self._written = block_table, written
            self._changed.notify_all()

    def note_blocks(self, block_table: tuple[int, ...]) -> None:
        """There are more blocks now."""
        with self._changed:
            self._table = block_table
            self._changed.notify_all()

    def close(self) -> None:
        """Nothing is written from the moment this returns. Idempotent."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        if self._connection is not None:
            _cut(self._connection)

    def serve(self, connection: socket.socket) -> None:
        """Take groups in until the connection ends."""
        self._connection = connection
        try:
            while (header := _receive(connection, _HEADER.size)) is not None:
                start, end, checksum = _HEADER.unpack(header)
                self._take(connection, start, end, checksum)
                connection.sendall(_ANSWER.pack(end))
                self._on_kv(end)
        except GearfallError as error:
            self._on_failure(error.message)
        except OSError:
            pass  # the call beside it says what became of the source

    def _take(self, connection: socket.socket, start: int, end: int, checksum: int) -> None:
        layout = self._memory.layout
        limit = layout.total_blocks * layout.block_tokens
        if start % layout.block_tokens or not start < end <= limit:
            raise Unavailable(f"a group of tokens {start} to {end} makes no sense")
        parts = tuple(_parts(start, end, layout.block_tokens))
        size = sum(tokens * layout.token_bytes for _, tokens in parts)
        content = _receive(connection, size)
        if content is None or xxhash.xxh3_64_intdigest(content) != checksum:
            raise Unavailable("keys and values were damaged on their way")
        with self._changed:
            self._wait_for_blocks(parts[-1][0] + 1)
            if start != self._written:
                raise Unavailable(f"a group starts at token {start}, not at {self._written}")
            at = 0
            for place, tokens in parts:
                part = tokens * layout.token_bytes
                view = memoryview(content)[at : at + part]
                self._memory.write(self._table[place], view, tokens)
                at += part
            self._written = end

    def _wait_for_blocks(self, count: int) -> None:
        """Return when the job has so many blocks; with `_changed` held."""

        def is_settled() -> bool:
            return self._is_closed or len(self._table) >= count

        if not self._changed.wait_for(is_settled, TIMEOUT_S) or self._is_closed:
            raise Unavailable("the held job has no blocks for what came")


class KvListener:
    """Where sources connect: one port of a worker for all its migrations."""

    def __init__(self, host: str) -> None:
        """Listen on a free port of `host`."""
        self._listener = socket.create_server((host, 0), backlog=16)
        self._inlets: dict[bytes, KvInlet] = {}
        self._lock = threading.Lock()
        self._connections: set[socket.socket] = set()
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, name="kv-accept", daemon=True).start()

    def expect(self, inlet: KvInlet) -> bytes:
        """Return a token good for one connection to `inlet`."""
        token = secrets.token_bytes(TOKEN_BYTES)
        with self._lock:
            self._inlets[token] = inlet
        return token

    def forget(self, token: bytes) -> None:
        """Make a token that nobody used worthless. Idempotent."""
        with self._lock:
            self._inlets.pop(token, None)

    def close(self) -> None:
        """Stop listening and cut every connection."""
        _cut(self._listener)
        self._listener.close()
        with self._lock:
            connections = tuple(self._connections)
        for connection in connections:
            _cut(connection)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                self._connections.add(connection)
            threading.Thread(
                target=self._serve, args=(connection,), name="kv-inlet", daemon=True
            ).start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            with connection, contextlib.suppress(OSError):
                connection.settimeout(TIMEOUT_S)
                token = _receive(connection, TOKEN_BYTES)
                with self._lock:
                    inlet = self._inlets.pop(bytes(token or b""), None)
                if inlet is not None:
                    connection.settimeout(None)
                    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    inlet.serve(connection)
        finally:
            with self._lock:
                self._connections.discard(connection)


class KvSender:
    """Sends a pinned job's blocks in the order they are given, from a thread of its own."""

    def __init__(
        self,
        host: str,
        port: int,
        token: bytes,
        memory: KvMemory,
        on_failure: Callable[[str], None],
    ) -> None:
        """`on_failure` is called on the sender's thread."""
        self._address = (host, port)
        self._token = token
        self._memory = memory
        self._on_failure = on_failure
        self._ranges: queue.SimpleQueue[tuple[int, int, tuple[int, ...]] | None]
        self._ranges = queue.SimpleQueue()
        self._socket: socket.socket | None = None
        self._unanswered = 0
        self._is_closed = False
        self.sent_bytes = 0
        self._thread = threading.Thread(target=self._run, name="kv-sender", daemon=True)
        self._thread.start()

    def send(self, start: int, end: int, block_table: tuple[int, ...]) -> None:
        """Send keys and values of tokens [start, end), which lie in these blocks."""
        self._ranges.put((start, end, block_table))

    def close(self) -> None:
        """End the connection; what was not sent stays unsent. Idempotent."""
        self._is_closed = True
        self._ranges.put(None)
        if self._socket is not None:
            _cut(self._socket)

    def _run(self) -> None:
        try:
            with socket.create_connection(self._address, timeout=TIMEOUT_S) as connection:
                self._socket = connection
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connection.sendall(self._token)
                while not self._is_closed and (item := self._ranges.get()) is not None:
                    self._send_range(connection, *item)
        except OSError as error:
            if not self._is_closed:
                self._on_failure(f"keys and values could not be sent: {error or type(error)}")

    def _send_range(
        self, connection: socket.socket, start: int, end: int, table: tuple[int, ...]
    ) -> None:
        block_tokens = self._memory.layout.block_tokens
        for first, last in groups_of(start, end, self._memory):
            content = b"".join(
                view
                for place, tokens in _parts(first, last, block_tokens)
                for view in self._memory.views(table[place], tokens)
            )
            header = _HEADER.pack(first, last, xxhash.xxh3_64_intdigest(content))
            connection.sendall(header)
            connection.sendall(content)
            self.sent_bytes += len(content)
            self._unanswered += 1
            self._hear(connection, WINDOW_GROUPS)
        self._hear(connection, 0)

    def _hear(self, connection: socket.socket, most_unanswered: int) -> None:
        while self._unanswered > most_unanswered:
            if _receive(connection, _ANSWER.size) is None:
                raise ConnectionError("the target took no more")
            self._unanswered -= 1


def _receive(connection: socket.socket, size: int) -> bytearray | None:
    """Return exactly `size` bytes; None when the connection ended before the first.

    Raises ConnectionError when it ended between.
    """
    content = bytearray(size)
    view, done = memoryview(content), 0
    while done < size:
        count = connection.recv_into(view[done:])
        if count == 0:
            if done == 0:
                return None
            raise ConnectionError("the connection ended within a message")
        done += count
    return content


def _cut(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
