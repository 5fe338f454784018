"""What neighbours may read from this store: tokens for its bulk socket, each good once."""

import asyncio
import os
from collections.abc import Sequence

from gearfall.core.errors import Conflict, InvalidRequest, NotFound, Unavailable
from gearfall.core.ids import ModelName
from gearfall.infra.net.bulk_socket import BulkServer, Offer
from services.store.tiers.pool import Pool
from services.store.tiers.ssd_tier import SsdTier
from services.store.tiers.stored_model import StoredModel

MAX_CONNECTIONS = 16
TOKEN_LIFE_S = 30.0


class Transfers:
    """Owns the bulk socket."""

    def __init__(self, ssd: SsdTier, pool: Pool, host: str) -> None:
        """`host` is where this store listens for gRPC."""
        self._ssd = ssd
        self._pool = pool
        self._host = host
        self._server: BulkServer | None = None

    @property
    def port(self) -> int:
        """Of the bulk socket."""
        assert self._server is not None
        return self._server.port

    def start(self) -> None:
        """Listen on a free port."""
        self._server = BulkServer(self._host)

    def close(self) -> None:
        """Cut every neighbour. Idempotent."""
        if self._server is not None:
            self._server.close()
            self._server = None

    def open(self, name: ModelName, digest: str, connections: int) -> tuple[bytes, list[bytes]]:
        """Return a model's manifest and a token for each connection.

        Raises NotFound when its bytes are not here, Conflict when they are not those of `digest`.
        """
        if self._server is None:
            raise Unavailable("the store is not serving yet")
        if not 1 <= connections <= MAX_CONNECTIONS:
            raise InvalidRequest(
                f"connections must be 1 to {MAX_CONNECTIONS}, not {connections}",
                param="connections",
            )
        stored = self._ssd.get(name)
        if stored.digest != digest:
            raise Conflict(f"model {name!r} is {stored.digest} here, not {digest[:64]}")
        server = self._server
        try:
            tokens = [server.offer(lambda: self._open_files(stored)) for _ in range(connections)]
        except OSError as error:
            raise NotFound(f"model {name!r} cannot be read here: {error}") from error
        asyncio.get_running_loop().call_later(TOKEN_LIFE_S, _withdraw, server, tokens)
        return stored.manifest_json, tokens

    def _open_files(self, stored: StoredModel) -> Offer:
        sizes = tuple(partition.size_bytes for partition in stored.manifest.partitions)
        resident = self._pool.peek(stored.name)
        if resident is not None:
            # Its memory lives on with these descriptors, whatever the pool evicts meanwhile.
            return Offer(tuple(os.dup(fd) for fd in resident.partition_fds), sizes)
        fds: list[int] = []
        try:
            for index in range(len(sizes)):
                fds.append(os.open(stored.partition_path(index), os.O_RDONLY | os.O_CLOEXEC))  # noqa: PERF401
        except OSError:
            for fd in fds:
                os.close(fd)
            raise
        return Offer(tuple(fds), sizes)


def _withdraw(server: BulkServer, tokens: Sequence[bytes]) -> None:
    for token in tokens:
        server.withdraw(token)
