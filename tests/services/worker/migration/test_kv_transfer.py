"""Blocks over a real socket, or gRPC, from one memory into another."""

import asyncio
import os
import queue
import socket
import struct
from collections.abc import AsyncIterator, Iterator
from functools import partial

import numpy as np
import pytest
import xxhash

from gearfall.infra.net.grpc_server import start_server
from gearfall.infra.net.token_listener import TokenListener
from services.worker.engine_link.kv_layout import KvLayer, KvLayout
from services.worker.engine_link.kv_memory import KvMemory
from services.worker.migration.cost import DataPath
from services.worker.migration.kv_carriers import Connect, SocketCarrier, StreamCarrier, StreamDoor
from services.worker.migration.kv_inlet import KvInlet
from services.worker.migration.kv_sender import KvSender, Link, Pace

BLOCK_TOKENS = 16
TOTAL_BLOCKS = 64
TOKEN_BYTES = 512


def memory(seed: int, *, shift: int = 0) -> KvMemory:
    """A cache of two layers full of random bytes; `shift` puts its layers elsewhere."""
    block_bytes = BLOCK_TOKENS * TOKEN_BYTES
    size = TOTAL_BLOCKS * block_bytes
    offsets = [shift + place * size for place in range(4)]
    layers = tuple(KvLayer(offsets[2 * i], offsets[2 * i + 1], block_bytes) for i in range(2))
    layout = KvLayout(TOTAL_BLOCKS, BLOCK_TOKENS, shift + 4 * size, layers)
    descriptor = os.memfd_create("kv")
    os.write(descriptor, np.random.default_rng(seed).bytes(layout.size_bytes))
    return KvMemory(descriptor, layout)


class Ends:
    """A target that listens and what it says."""

    def __init__(self) -> None:
        self.source, self.target = memory(1), memory(2, shift=4096)
        self.filled: queue.Queue[int] = queue.Queue()
        self.failures: queue.Queue[str] = queue.Queue()
        self.listener = TokenListener("127.0.0.1", name="kv-inlet")
        self.inlet = KvInlet(self.target, self.filled.put, self.failures.put)
        self.token = self.listener.expect(self.inlet)

    def connect(self, pace: Pace | None = None, link: Link | None = None) -> KvSender:
        way = partial(SocketCarrier, "127.0.0.1", self.listener.port, self.token)
        return KvSender((way,), self.source, self.failures.put, pace, link)

    def raw(self) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.listener.port), timeout=5)
        connection.sendall(self.token)
        return connection

    def until_filled(self, tokens: int) -> None:
        while self.filled.get(timeout=10) < tokens:
            pass


@pytest.fixture
def ends() -> Iterator[Ends]:
    opened = Ends()
    yield opened
    opened.listener.close()


TABLE = tuple(range(40, 0, -1))
OTHER = tuple(range(10, 50))


def equal(ends: Ends, block: int, tokens: int | None = None) -> bool:
    return ends.source.read(TABLE[block], tokens) == ends.target.read(OTHER[block], tokens)


def test_ranges_arrive_in_the_blocks_of_the_other_table_and_nowhere_else(ends):
    before = [ends.target.read(block) for block in range(TOTAL_BLOCKS)]
    ends.inlet.open(OTHER, 16)
    sender = ends.connect()
    sender.send(16, 480, TABLE)
    sender.send(480, 490, TABLE)
    ends.until_filled(490)
    assert all(equal(ends, block) for block in range(1, 30))
    assert equal(ends, 30, 10)
    untouched = set(range(TOTAL_BLOCKS)) - set(OTHER[1:31])
    assert all(ends.target.read(block) == before[block] for block in untouched)
    assert sender.sent_bytes == (490 - 16) * ends.source.layout.token_bytes
    sender.close()


def test_what_comes_before_its_blocks_waits_for_them(ends):
    ends.inlet.open(OTHER[:2], 0)
    sender = ends.connect()
    sender.send(0, 32, TABLE)
    ends.until_filled(32)
    sender.send(32, 64, TABLE)
    assert ends.filled.empty()
    ends.inlet.note_blocks(OTHER[:4])
    ends.until_filled(64)
    assert equal(ends, 3)
    sender.close()


def test_nothing_is_written_once_the_inlet_is_closed(ends):
    ends.inlet.open(OTHER, 0)
    before = ends.target.read(OTHER[0])
    ends.inlet.close()
    sender = ends.connect()
    sender.send(0, 16, TABLE)
    assert "no blocks" in ends.failures.get(timeout=10)
    assert ends.target.read(OTHER[0]) == before
    sender.close()


def group(start: int, end: int, content: bytes, checksum: int | None = None) -> bytes:
    found = xxhash.xxh3_64_intdigest(content) if checksum is None else checksum
    return struct.pack("<IIQ", start, end, found) + content


FULL = b"x" * (BLOCK_TOKENS * 4 * TOKEN_BYTES)


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (group(0, 16, FULL, checksum=1), "damaged"),
        (group(3, 16, FULL), "makes no sense"),
        (group(16, 16, b""), "makes no sense"),
        (group(0, 1 << 30, b""), "makes no sense"),
        (group(16, 32, FULL), "starts at token 16, not at 0"),
    ],
)
def test_a_group_that_is_not_right_is_refused_and_not_written(ends, message, reason):
    ends.inlet.open(OTHER, 0)
    before = ends.target.read(OTHER[0]) + ends.target.read(OTHER[1])
    with ends.raw() as connection:
        connection.sendall(message)
        assert reason in ends.failures.get(timeout=10)
    assert ends.target.read(OTHER[0]) + ends.target.read(OTHER[1]) == before


def test_a_token_is_good_for_one_connection_and_none_else(ends):
    ends.inlet.open(OTHER, 0)
    with ends.raw() as first:
        first.sendall(group(0, 16, FULL))
        assert first.recv(4) == struct.pack("<I", 16)
        with ends.raw() as second:
            assert second.recv(1) == b""
    other = Ends()
    other.listener.forget(other.token)
    with other.raw() as late:
        assert late.recv(1) == b""
    other.listener.close()


def test_a_target_that_goes_away_is_a_failure(ends):
    ends.inlet.open(OTHER, 0)
    sender = ends.connect()
    sender.send(0, 16, TABLE)
    ends.until_filled(16)
    ends.listener.close()
    sender.send(16, 32, TABLE)
    assert "could not be sent" in ends.failures.get(timeout=10)


def test_a_closed_inlet_ends_its_connection(ends):
    ends.inlet.open(OTHER, 0)
    with ends.raw() as connection:
        connection.sendall(group(0, 16, FULL))
        assert connection.recv(4) == struct.pack("<I", 16)
        ends.inlet.close()
        assert connection.recv(1) == b""


class Streamed:
    """Both ends of a stream over gRPC, whose target listens at no socket that can be reached."""

    def __init__(self, ends: Ends, address: str) -> None:
        self.ends, self.address = ends, address

    def connect(self, *ways: Connect) -> KvSender:
        stream = partial(StreamCarrier, self.address, self.ends.token)
        return KvSender((*ways, stream), self.ends.source, self.ends.failures.put)


@pytest.fixture
async def streamed(ends: Ends) -> AsyncIterator[Streamed]:
    door = StreamDoor(ends.listener.take)
    server = await start_server("127.0.0.1:0", door.add_to, ())
    yield Streamed(ends, server.address)
    await server.stop(0.0)


async def test_what_the_socket_cannot_carry_goes_over_grpc(streamed):
    ends = streamed.ends
    ends.inlet.open(OTHER, 0)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    sender = streamed.connect(partial(SocketCarrier, "127.0.0.1", port, ends.token))
    sender.send(0, 480, TABLE)
    sender.send(480, 490, TABLE)
    await asyncio.to_thread(ends.until_filled, 490)
    assert all(equal(ends, block) for block in range(30))
    assert equal(ends, 30, 10)
    assert sender.path is DataPath.KV_STREAM
    assert sender.sent_bytes == 490 * ends.source.layout.token_bytes
    sender.close()


async def test_the_socket_is_taken_where_it_opens(streamed):
    ends = streamed.ends
    ends.inlet.open(OTHER, 0)
    sender = streamed.connect(partial(SocketCarrier, "127.0.0.1", ends.listener.port, ends.token))
    sender.send(0, 32, TABLE)
    await asyncio.to_thread(ends.until_filled, 32)
    assert sender.path is DataPath.KV
    sender.close()


async def test_a_stream_without_its_token_is_refused(streamed):
    ends = streamed.ends
    ends.inlet.open(OTHER, 0)
    before = ends.target.read(OTHER[0])
    ends.listener.forget(ends.token)
    sender = streamed.connect()
    sender.send(0, 16, TABLE)
    reason = await asyncio.to_thread(ends.failures.get, timeout=10)
    assert "nobody expects" in reason
    assert ends.target.read(OTHER[0]) == before
    sender.close()


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (group(0, 16, FULL, checksum=1), "damaged"),
        (group(3, 16, FULL), "makes no sense"),
        (group(0, 16, FULL[:-1]), "has 32767 bytes"),
        (b"short", "without a header"),
        (group(16, 32, FULL), "starts at token 16, not at 0"),
    ],
)
async def test_a_message_that_is_not_right_is_refused_and_not_written(streamed, message, reason):
    ends = streamed.ends
    ends.inlet.open(OTHER, 0)
    before = ends.target.read(OTHER[0]) + ends.target.read(OTHER[1])
    carrier = StreamCarrier(streamed.address, ends.token)
    carrier.send(message, b"")
    with pytest.raises(ConnectionError, match=reason):
        await asyncio.to_thread(carrier.hear)
    assert reason in ends.failures.get(timeout=10)
    assert ends.target.read(OTHER[0]) + ends.target.read(OTHER[1]) == before
    carrier.close()


async def test_a_closed_inlet_ends_its_stream(streamed):
    ends = streamed.ends
    ends.inlet.open(OTHER[:1], 0)
    carrier = StreamCarrier(streamed.address, ends.token)
    carrier.send(group(0, 16, FULL), b"")
    await asyncio.to_thread(carrier.hear)
    carrier.send(group(16, 32, FULL), b"")
    ends.inlet.close()
    with pytest.raises(ConnectionError, match="no blocks"):
        await asyncio.to_thread(carrier.hear)
    carrier.close()


class Clocks:
    """A thread's own time and everybody's."""

    def __init__(self) -> None:
        self.busy_s = self.now_s = 5.0

    def pace(self, share: float) -> Pace:
        return Pace(share, busy=lambda: self.busy_s, clock=lambda: self.now_s)


@pytest.mark.parametrize(
    ("busy_s", "took_s", "rest_s"), [(0.1, 0.1, 0.3), (0.1, 0.35, 0.05), (0.1, 0.5, 0.0)]
)
def test_a_sender_rests_for_what_it_computed_and_not_for_what_it_waited(busy_s, took_s, rest_s):
    clocks = Clocks()
    pace = clocks.pace(0.25)
    for _ in range(3):
        pace.begin()
        clocks.busy_s += busy_s
        clocks.now_s += took_s
        assert pace.rest_s() == pytest.approx(rest_s)


def test_what_a_frozen_job_waits_for_is_not_held_up(ends):
    """The rest behind the first group would not end before the test's own limit."""
    ends.inlet.open(OTHER, 0)
    sender = ends.connect(Pace(1e-9))
    sender.send(0, 32, TABLE)
    ends.until_filled(32)
    sender.send(32, 490, TABLE, is_urgent=True)
    ends.until_filled(490)
    assert equal(ends, 29)
    sender.close()


def test_a_link_takes_as_long_as_its_bytes_and_those_before_them() -> None:
    now_s = 100.0
    link = Link(1000.0, lambda: now_s)
    assert link.take(500) == pytest.approx(0.5)
    assert link.take(500) == pytest.approx(1.0)
    now_s += 0.8
    assert link.take(1000) == pytest.approx(1.2)
    now_s += 60.0
    assert link.take(10) == pytest.approx(0.01), "what was not used is gone"
    assert Link(0.0, lambda: now_s).take(10**12) == 0.0


def test_a_sender_behind_a_slow_link_sends_nothing_early_and_ends_at_once(ends: Ends) -> None:
    asked = queue.SimpleQueue[int]()

    class NeverThere(Link):
        def take(self, size_bytes: int) -> float:
            asked.put(size_bytes)
            return 3600.0

    sender = ends.connect(link=NeverThere(1.0))
    sender.send(0, 32, TABLE, is_urgent=True)
    assert asked.get(timeout=10) == 32 * ends.source.layout.token_bytes
    assert ends.filled.empty()
    sender.close()
    sender._thread.join(timeout=10)
    assert not sender._thread.is_alive()
    assert ends.filled.empty()
