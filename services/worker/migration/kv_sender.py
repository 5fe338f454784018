"""Sends a pinned job's blocks to the target, group by group, from a thread of its own."""

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence

import xxhash

from services.worker.engine_link.kv_memory import KvMemory
from services.worker.migration.cost import DataPath
from services.worker.migration.kv_carriers import Carrier, Connect
from services.worker.migration.kv_groups import HEADER, WINDOW_GROUPS, groups_of, parts_of

_log = logging.getLogger(__name__)

CALM_SHARE = 0.25
"""Of one core's time, while the job still runs at its source: the cores are the engines'."""

Range = tuple[int, int, tuple[int, ...]]
"""First and last token, end exclusive, and the blocks that they lie in."""


class Pace:
    """How long a thread rests so that its work takes no more than its share of one core."""

    def __init__(
        self,
        share: float = CALM_SHARE,
        *,
        busy: Callable[[], float] = time.thread_time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`busy`: seconds that the calling thread has computed; a wait for the network is none."""
        self._share = share
        self._busy = busy
        self._clock = clock
        self._busy_s = self._clock_s = 0.0

    def begin(self) -> None:
        """The next piece of work begins."""
        self._busy_s, self._clock_s = self._busy(), self._clock()

    def rest_s(self) -> float:
        """Return how long to rest behind it."""
        busy_s = self._busy() - self._busy_s
        return max(0.0, busy_s / self._share - (self._clock() - self._clock_s))


class Link:
    """A link of so many bytes a second: how long the next ones are on their way."""

    def __init__(self, bytes_per_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """`bytes_per_s` 0: they are there at once."""
        self._bytes_per_s = bytes_per_s
        self._clock = clock
        self._free_s = 0.0

    def take(self, size_bytes: int) -> float:
        """Return the seconds until bytes that are sent now have arrived behind those before."""
        if not self._bytes_per_s:
            return 0.0
        now_s = self._clock()
        self._free_s = max(self._free_s, now_s) + size_bytes / self._bytes_per_s
        return self._free_s - now_s


class KvSender:
    """Owner of the way to one target's inlet."""

    def __init__(
        self,
        ways: Sequence[Connect],
        memory: KvMemory,
        on_failure: Callable[[str], None],
        pace: Pace | None = None,
        link: Link | None = None,
    ) -> None:
        """`ways`: tried in order until one opens. `on_failure` is called on the sender's thread."""
        self._pace = pace or Pace()
        self._link = link or Link(0.0)
        self._ended = threading.Event()
        self._is_hurried = threading.Event()
        self._ways = ways
        self._memory = memory
        self._on_failure = on_failure
        self._ranges: queue.SimpleQueue[Range | None] = queue.SimpleQueue()
        self._carrier: Carrier | None = None
        self._unanswered = 0
        self._is_closed = False
        self.sent_bytes = 0
        self.path: DataPath | None = None
        """The way that opened; None before one has."""
        self._thread = threading.Thread(target=self._run, name="kv-sender", daemon=True)
        self._thread.start()

    def send(
        self, start: int, end: int, block_table: tuple[int, ...], *, is_urgent: bool = False
    ) -> None:
        """Send keys and values of tokens [start, end), which lie in these blocks.

        An urgent range, and what is still to be sent before it, goes without rests.
        """
        if is_urgent:
            self._is_hurried.set()
        self._ranges.put((start, end, block_table))

    def close(self) -> None:
        """End the connection; what was not sent stays unsent. Idempotent."""
        self._is_closed = True
        self._is_hurried.set()
        self._ended.set()
        self._ranges.put(None)
        if self._carrier is not None:
            self._carrier.cut()

    def _run(self) -> None:
        try:
            carrier = self._carrier = self._connect()
            self.path = carrier.path
            try:
                while not self._is_closed and (item := self._ranges.get()) is not None:
                    self._send_range(carrier, *item)
            finally:
                carrier.close()
        except OSError as error:
            if not self._is_closed:
                self._on_failure(f"keys and values could not be sent: {error or type(error)}")

    def _connect(self) -> Carrier:
        for connect in self._ways[:-1]:
            try:
                return connect()
            except OSError as error:
                _log.info("keys and values go another way", extra={"error": str(error)})
        return self._ways[-1]()

    def _send_range(self, carrier: Carrier, start: int, end: int, table: tuple[int, ...]) -> None:
        layout = self._memory.layout
        for first, last in groups_of(start, end, layout):
            self._pace.begin()
            content = b"".join(
                view
                for place, tokens in parts_of(first, last, layout.block_tokens)
                for view in self._memory.views(table[place], tokens)
            )
            header = HEADER.pack(first, last, xxhash.xxh3_64_intdigest(content))
            # Before they are sent: the target may have them, and say so, before this goes on.
            self.sent_bytes += len(content)
            self._unanswered += 1
            self._ended.wait(self._link.take(len(content)))
            carrier.send(header, content)
            self._hear(carrier, WINDOW_GROUPS)
            self._is_hurried.wait(self._pace.rest_s())
        self._hear(carrier, 0)

    def _hear(self, carrier: Carrier, most_unanswered: int) -> None:
        while self._unanswered > most_unanswered:
            carrier.hear()
            self._unanswered -= 1
