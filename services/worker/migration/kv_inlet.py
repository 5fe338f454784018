"""Where the target takes keys and values in: into the blocks of one held job, and no others."""

import socket
import threading
from collections.abc import Callable

import xxhash

from gearfall.core.errors import GearfallError, Unavailable
from gearfall.infra.net.token_listener import TIMEOUT_S, cut, receive
from services.worker.engine_link.kv_memory import KvMemory
from services.worker.migration.kv_groups import ANSWER, HEADER, check_group, parts_of, unpack_group


class KvInlet:
    """What one migration writes into a held job's blocks. Shared by the loop and one thread.

    A `Guest` of the token listener; groups that come another way are given to `take_message`.
    """

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
            cut(self._connection)

    def serve(self, connection: socket.socket) -> None:
        """Take groups in until the connection ends."""
        self._connection = connection
        connection.settimeout(None)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            while True:
                start, end, checksum = HEADER.unpack(receive(connection, HEADER.size))
                content = receive(connection, check_group(start, end, self._memory.layout))
                self._take(start, end, checksum, memoryview(content))
                connection.sendall(ANSWER.pack(end))
                self._on_kv(end)
        except GearfallError as error:
            self._on_failure(error.message)

    def dismiss(self) -> None:
        """See `Guest`: the migration has ended, or goes another way."""

    def take_message(self, message: bytes) -> bytes:
        """Take in one group that came whole; return the answer. Raises Unavailable."""
        try:
            start, end, checksum, content = unpack_group(message, self._memory.layout)
            self._take(start, end, checksum, content)
        except Unavailable as error:
            self._on_failure(error.message)
            raise
        self._on_kv(end)
        return ANSWER.pack(end)

    def _take(self, start: int, end: int, checksum: int, content: memoryview) -> None:
        layout = self._memory.layout
        if xxhash.xxh3_64_intdigest(content) != checksum:
            raise Unavailable("keys and values were damaged on their way")
        parts = tuple(parts_of(start, end, layout.block_tokens))
        with self._changed:
            self._wait_for_blocks(parts[-1][0] + 1)
            if start != self._written:
                raise Unavailable(f"a group starts at token {start}, not at {self._written}")
            at = 0
            for place, tokens in parts:
                part = tokens * layout.token_bytes
                self._memory.write(self._table[place], content[at : at + part], tokens)
                at += part
            self._written = end

    def _wait_for_blocks(self, count: int) -> None:
        """Return when the job has so many blocks; with `_changed` held."""

        def is_settled() -> bool:
            return self._is_closed or len(self._table) >= count

        if not self._changed.wait_for(is_settled, TIMEOUT_S) or self._is_closed:
            raise Unavailable("the held job has no blocks for what came")
