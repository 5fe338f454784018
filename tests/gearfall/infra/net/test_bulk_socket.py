"""Bulk transfers: exact bytes for the holder of a token, nothing for anybody else."""

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from gearfall.core.errors import Unavailable
from gearfall.infra.net.bulk_socket import BulkConnection, BulkServer, Offer
from gearfall.infra.net.token_listener import TOKEN_BYTES

HOST = "127.0.0.1"
CONTENT = os.urandom(3 * 2**20)


@pytest.fixture
def server() -> Iterator[BulkServer]:
    server = BulkServer(HOST)
    yield server
    server.close()


@pytest.fixture
def token(server: BulkServer, tmp_path: Path) -> bytes:
    path = tmp_path / "f"
    path.write_bytes(CONTENT)
    return server.offer(lambda: Offer((os.open(path, os.O_RDONLY),), (len(CONTENT),)))


def read(connection: BulkConnection, offset: int, size: int, file: int = 0) -> bytes:
    content = bytearray(size)
    connection.read_into(file, offset, memoryview(content))
    return bytes(content)


def test_ranges_come_as_they_are(server: BulkServer, token: bytes):
    connection = BulkConnection(HOST, server.port, token)
    for offset, size in ((0, 1), (7, 1000), (0, len(CONTENT)), (len(CONTENT) - 1, 1)):
        assert read(connection, offset, size) == CONTENT[offset:][:size]
    connection.close()


@pytest.mark.parametrize(
    ("file", "offset", "size"),
    [(1, 0, 1), (0, len(CONTENT), 1), (0, 0, len(CONTENT) + 1), (0, 2**63, 2), (2**63, 0, 1)],
)
def test_what_is_not_offered_is_not_served(
    server: BulkServer, token: bytes, file: int, offset: int, size: int
):
    connection = BulkConnection(HOST, server.port, token)
    with pytest.raises(Unavailable):
        read(connection, offset, size, file)
    connection.close()


def test_a_token_is_good_once(server: BulkServer, token: bytes):
    first = BulkConnection(HOST, server.port, token)
    assert read(first, 0, 5) == CONTENT[:5]
    for used in (token, bytes(TOKEN_BYTES)):
        second = BulkConnection(HOST, server.port, used)
        with pytest.raises(Unavailable):
            read(second, 0, 5)
        second.close()
    first.close()


def test_a_withdrawn_token_is_worthless(server: BulkServer, token: bytes):
    server.withdraw(token)
    server.withdraw(token)
    connection = BulkConnection(HOST, server.port, token)
    with pytest.raises(Unavailable):
        read(connection, 0, 5)
    connection.close()


def test_a_server_that_ends_cuts_its_connections(server: BulkServer, token: bytes):
    connection = BulkConnection(HOST, server.port, token)
    assert read(connection, 0, 5) == CONTENT[:5]
    server.close()
    with pytest.raises(Unavailable):
        read(connection, 0, 5)
    connection.close()
    with pytest.raises(Unavailable):
        BulkConnection(HOST, server.port, token)


def test_a_cut_ends_a_read_that_waits(server: BulkServer):
    with socket.create_server((HOST, 0)) as silent:
        connection = BulkConnection(HOST, silent.getsockname()[1], bytes(TOKEN_BYTES))
        failed = threading.Event()

        def wait() -> None:
            with pytest.raises(Unavailable):
                read(connection, 0, 5)
            failed.set()

        reader = threading.Thread(target=wait)
        reader.start()
        connection.cut()
        assert failed.wait(10)
        reader.join()
        connection.close()
