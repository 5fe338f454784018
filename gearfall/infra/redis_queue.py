"""The job queue in Redis Streams: one stream a model, one consumer group, a worker a consumer.

An entry lives from `append` (XADD) through `claim` (XREADGROUP: pending at one consumer) to
`acknowledge` (XACK and XDEL together), so that the stream's length is what is not yet done.
Cancelling, taking over and counting are scripts: the server runs each of them undivided.
"""

import asyncio
import contextlib
import logging
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, cast

from google.protobuf.message import DecodeError
from redis import exceptions
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from gearfall.core.errors import Conflict, GearfallError, NotFound, Unavailable
from gearfall.core.ids import ModelName
from gearfall.core.job import Job
from gearfall.core.ports import QueueDepth, QueuedJob
from gearfall.infra.convert import job_from_pb, job_to_pb
from gearfall.infra.redis_appends import JoinedAppends
from gearfall.infra.redis_errors import UNREACHABLE, error_from_redis
from gearfall.infra.redis_scripts import ACKNOWLEDGE, ADOPT, CANCEL, DEPTH, RECLAIM
from gearfall.pb import common_pb2 as pb

_log = logging.getLogger(__name__)

GROUP = b"workers"
FIELD = b"job"
_SETTLE_S = 2.0
_MOST_ACKNOWLEDGED = 1000
"""Entries of one script call: Lua's stack is finite."""


class RedisQueue:
    """The `JobQueue` port over one Redis or Valkey server.

    One object serves one process. It remembers the entries that it holds unacknowledged: when a
    claim was interrupted (cancelled, connection lost) after the server had handed entries out, the
    next claim of the same model and consumer returns those first.
    """

    def __init__(
        self, url: str, *, key_prefix: str = "gearfall:v1:queue:", timeout_s: float = 1.5
    ) -> None:
        """Connects lazily. `timeout_s`: deadline of each command, beyond the time it may block."""
        self._prefix = key_prefix
        self._timeout_s = timeout_s
        # A blocked claim keeps a connection of the pool to itself, so it delays nobody. Protocol 2
        # is asked for because the replies of streams differ in protocol 3.
        self._redis: Any = Redis.from_url(
            url,
            protocol=2,
            socket_timeout=None,
            socket_connect_timeout=timeout_s,
            retry=Retry(NoBackoff(), 0),
            max_connections=1024,
        )
        self._acknowledge = self._redis.register_script(ACKNOWLEDGE)
        self._cancel = self._redis.register_script(CANCEL)
        self._depth = self._redis.register_script(DEPTH)
        self._reclaim = self._redis.register_script(RECLAIM)
        self._appends = JoinedAppends(self._redis, self._call)
        self._adopt = self._redis.register_script(ADOPT)
        self._held: defaultdict[tuple[ModelName, str], set[str]] = defaultdict(set)
        self._claims_in_flight: defaultdict[tuple[ModelName, str], int] = defaultdict(int)
        self._is_closed = False
        self._interrupted_s: dict[tuple[ModelName, str], float] = {}

    async def append(self, job: Job) -> str:
        """See the port. After Unavailable the entry may exist: a claimer must tolerate it."""
        fields = {FIELD: job_to_pb(job).SerializeToString()}
        return (await self._appends.append(self._key(job.model), fields)).decode()

    async def claim(
        self, model: ModelName, consumer: str, *, max_jobs: int, block_s: float
    ) -> Sequence[QueuedJob]:
        """See the port."""
        place = (model, consumer)
        if place in self._interrupted_s and not self._claims_in_flight[place]:
            adopted = await self._adopt_unseen(model, consumer, max_jobs)
            if adopted:
                return adopted
        self._claims_in_flight[place] += 1
        try:
            rows = await self._read_group(model, consumer, max_jobs, block_s)
        except BaseException:
            self._interrupted_s[place] = time.monotonic()
            raise
        finally:
            self._claims_in_flight[place] -= 1
        return await self._take(place, [(entry_id, 1, fields) for entry_id, fields in rows])

    async def acknowledge(self, model: ModelName, entry_ids: Sequence[str]) -> None:
        """See the port."""
        if not entry_ids:
            return
        for start in range(0, len(entry_ids), _MOST_ACKNOWLEDGED):
            arguments: list[Any] = [GROUP, *entry_ids[start : start + _MOST_ACKNOWLEDGED]]
            remove = partial(self._acknowledge, [self._key(model)], arguments)
            await self._call(remove, attempts=2)
        for (held_model, _), held in self._held.items():
            if held_model == model:
                held.difference_update(entry_ids)

    async def reclaim(
        self, model: ModelName, consumer: str, *, alive: frozenset[str], max_jobs: int
    ) -> Sequence[QueuedJob]:
        """See the port."""
        arguments: list[Any] = [GROUP, consumer, max_jobs, *sorted(alive)]
        rows = await self._call(partial(self._reclaim, [self._key(model)], arguments))
        return await self._take((model, consumer), [_row(row) for row in rows])

    async def cancel(self, model: ModelName, entry_id: str) -> bool:
        """See the port."""
        arguments: list[Any] = [GROUP, entry_id]
        return bool(await self._call(partial(self._cancel, [self._key(model)], arguments)))

    async def contains(self, model: ModelName, entry_id: str) -> bool:
        """See the port."""
        rows = await self._call(
            partial(self._redis.xrange, self._key(model), entry_id, entry_id, count=1), attempts=2
        )
        return bool(rows)

    async def holder(self, model: ModelName, entry_id: str) -> str | None:
        """See the port."""
        ask = partial(
            self._redis.xpending_range, self._key(model), GROUP, entry_id, entry_id, count=1
        )
        try:
            rows = await self._call(ask, attempts=2)
        except NotFound:
            return None  # no group yet: nobody has claimed anything
        return cast("bytes", rows[0]["consumer"]).decode() if rows else None

    async def depth(self, model: ModelName) -> QueueDepth:
        """See the port."""
        length, claimed = await self._call(
            partial(self._depth, [self._key(model)], [GROUP]), attempts=2
        )
        return QueueDepth(waiting=length - claimed, claimed=claimed)

    async def drop(self, model: ModelName) -> None:
        """See the port."""
        await self._call(partial(self._redis.delete, self._key(model)), attempts=2)
        for held_model, consumer in self._held:
            if held_model == model:
                self._held[held_model, consumer].clear()

    async def close(self) -> None:
        """Close all connections; blocked claims raise Unavailable."""
        self._is_closed = True
        await self._redis.aclose()
        await self._redis.connection_pool.disconnect()

    async def _read_group(
        self, model: ModelName, consumer: str, max_jobs: int, block_s: float
    ) -> Sequence[tuple[bytes, dict[bytes, bytes]]]:
        """Return the rows of one XREADGROUP; creates the group, and once more if it was lost."""
        deadline_s = time.monotonic() + block_s
        key = self._key(model)
        while True:
            left_s = max(0.0, deadline_s - time.monotonic())
            # BLOCK 0 would mean for ever.
            block_ms = max(1, round(left_s * 1000)) if block_s > 0 else None

            read = partial(self._redis.xreadgroup, GROUP, consumer, {key: ">"}, max_jobs, block_ms)
            try:
                reply = await self._call(read, extra_s=left_s)
            except NotFound:
                await self._create_group(key)
                continue
            return reply[0][1] if reply else ()

    async def _create_group(self, key: str) -> None:
        """Create stream and group, from the first entry on; nothing to do if another was faster."""
        with contextlib.suppress(Conflict):
            await self._call(partial(self._redis.xgroup_create, key, GROUP, id="0", mkstream=True))

    async def _adopt_unseen(
        self, model: ModelName, consumer: str, max_jobs: int
    ) -> Sequence[QueuedJob]:
        """Return entries that the server gave this consumer and an interrupted claim never saw."""
        place = (model, consumer)
        arguments: list[Any] = [GROUP, consumer, max_jobs, *sorted(self._held[place])]
        rows = await self._call(partial(self._adopt, [self._key(model)], arguments))
        # The server may notice only now that the interrupted claim's connection is gone.
        is_settled = time.monotonic() - self._interrupted_s[place] > _SETTLE_S
        if len(rows) < max_jobs and is_settled:
            del self._interrupted_s[place]
        return await self._take(place, [_row(row) for row in rows])

    async def _take(
        self, place: tuple[ModelName, str], rows: Sequence[tuple[bytes, int, dict[bytes, bytes]]]
    ) -> Sequence[QueuedJob]:
        taken: list[QueuedJob] = []
        malformed: list[str] = []
        for raw_id, deliveries, fields in rows:
            entry_id = raw_id.decode()
            try:
                job = _job_from(fields)
            except (DecodeError, KeyError, ValueError, GearfallError) as error:
                malformed.append(entry_id)
                _log.warning(
                    "dropped a malformed queue entry",
                    extra={"model": place[0], "entry_id": entry_id, "error": str(error)},
                )
                continue
            taken.append(QueuedJob(entry_id, job, deliveries))
        self._held[place].update(entry.entry_id for entry in taken)
        await self.acknowledge(place[0], malformed)
        return taken

    async def _call(
        self, operation: Callable[[], Awaitable[Any]], *, attempts: int = 1, extra_s: float = 0.0
    ) -> Any:
        """Run one command under its deadline; several attempts for idempotent commands only."""
        if self._is_closed:
            raise Unavailable("the connection to the queue server is closed")
        for attempt in range(attempts, 0, -1):
            try:
                async with asyncio.timeout(self._timeout_s + extra_s):
                    return await operation()
            except (exceptions.RedisError, TimeoutError, OSError) as error:
                if attempt == 1 or not isinstance(error, UNREACHABLE):
                    raise error_from_redis(error) from error
        raise AssertionError("attempts must be at least 1")

    def _key(self, model: ModelName) -> str:
        return self._prefix + model


def _row(row: Sequence[Any]) -> tuple[bytes, int, dict[bytes, bytes]]:
    """Return (id, deliveries, fields) from a script's row, whose fields are a flat list."""
    entry_id, deliveries, flat = row
    return entry_id, deliveries, dict(zip(flat[::2], flat[1::2], strict=True))


def _job_from(fields: dict[bytes, bytes]) -> Job:
    message = pb.Job()
    message.ParseFromString(fields[FIELD])
    return job_from_pb(message)
