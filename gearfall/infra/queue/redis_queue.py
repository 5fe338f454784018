"""The job queue in Redis Streams: two streams a model, a consumer group each, a worker a consumer.

Interactive jobs have one stream and batch jobs the other, so that a backlog of these delays none of
those. What a stream is below is one of them; an entry's id says in which it lies.

An entry lives from `append` (XADD) through `claim` (XREADGROUP: pending at one consumer) to
`acknowledge` (XACK and XDEL together), so that the stream's length is what is not yet done.
Cancelling, taking over and counting are scripts: the server runs each of them undivided.
"""

import asyncio
import contextlib
import logging
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import partial
from typing import Any, cast

from google.protobuf.message import DecodeError
from redis import exceptions
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from gearfall.core.errors import GearfallError, NotFound, Unavailable
from gearfall.core.generation.job import Job, Priority
from gearfall.core.ids import ModelName
from gearfall.core.ports import Arrivals, QueueDepth, QueuedJob
from gearfall.infra.net.convert import job_from_pb, job_to_pb
from gearfall.infra.queue.redis_appends import JoinedAppends
from gearfall.infra.queue.redis_errors import UNREACHABLE, error_from_redis
from gearfall.infra.queue.redis_lanes import (
    GROUP,
    LANES,
    Row,
    find_entry,
    ids_by_lane,
    name_entry,
    row_of,
    stream_key,
)
from gearfall.infra.queue.redis_reads import LaneReads
from gearfall.infra.queue.redis_restarts import RestartWatch
from gearfall.infra.queue.redis_scripts import (
    ACKNOWLEDGE,
    ADOPT,
    ARRIVALS,
    CANCEL,
    DEPTH,
    PEEK,
    RECLAIM,
)
from gearfall.infra.queue.redis_wire import Wires
from gearfall.pb import common_pb2 as pb

_log = logging.getLogger(__name__)

FIELD = b"job"
SETTLE_S = 2.0
_MALFORMED = (DecodeError, KeyError, ValueError, GearfallError)
"""What an entry raises that is no job."""
_MOST_ACKNOWLEDGED = 1000
"""Entries of one script call: Lua's stack is finite."""


class RedisQueue:
    """The `JobQueue` port over one Redis or Valkey server.

    One object serves one process. It remembers the entries that it holds unacknowledged: when a
    call was interrupted (cancelled, connection lost) after the server had handed entries out, or
    the server came back with entries that had been acknowledged, the next claim of the same model
    and consumer returns those first.
    """

    def __init__(
        self,
        url: str,
        *,
        key_prefix: str = "gearfall:v1:queue:",
        timeout_s: float = 1.5,
        settle_s: float = SETTLE_S,
    ) -> None:
        """Connects lazily. `timeout_s`: deadline of each command, beyond the time it may block.

        `settle_s`: how long after a broken call its entries may still turn up at the server.
        """
        self._prefix = key_prefix
        self._timeout_s = timeout_s
        self._settle_s = settle_s
        self._watch = RestartWatch(self._doubt_claims)
        # A blocked claim keeps a connection of the pool to itself, so it delays nobody. Protocol 2
        # is asked for because the replies of streams differ in protocol 3.
        self._redis: Any = Redis.from_url(
            url,
            protocol=2,
            socket_timeout=None,
            socket_connect_timeout=timeout_s,
            retry=Retry(NoBackoff(), 0),
            max_connections=1024,
            redis_connect_func=self._watch.greet,
        )
        self._wires = Wires(self._redis.connection_pool)
        self._acknowledge = partial(self._wires.script, ACKNOWLEDGE)
        self._cancel = partial(self._wires.script, CANCEL)
        self._depth = partial(self._wires.script, DEPTH)
        self._arrivals = partial(self._wires.script, ARRIVALS)
        self._peek = partial(self._wires.script, PEEK)
        self._reclaim = partial(self._wires.script, RECLAIM)
        self._appends = JoinedAppends(self._wires, self._call)
        self._reads = LaneReads(self._wires, self._call, self._key)
        self._adopt = partial(self._wires.script, ADOPT)
        self._held: defaultdict[tuple[ModelName, str], set[str]] = defaultdict(set)
        self._claims_in_flight: defaultdict[tuple[ModelName, str], int] = defaultdict(int)
        self._is_closed = False
        self._doubted_s: dict[tuple[tuple[ModelName, str], Priority], float] = {}
        """Since when each lane may have entries of a consumer that nobody here has seen."""

    @property
    def restarts(self) -> int:
        """See the port."""
        return self._watch.restarts

    async def append(self, job: Job) -> str:
        """See the port. After Unavailable the entry may exist: a claimer must tolerate it."""
        fields = {FIELD: job_to_pb(job).SerializeToString()}
        key, lanes = self._key(job.model, job.priority), self._keys(job.model)
        return name_entry(await self._appends.append(key, fields, lanes), job.priority)

    async def claim(
        self,
        model: ModelName,
        consumer: str,
        *,
        max_jobs: int,
        block_s: float,
        max_batch_jobs: int | None = None,
    ) -> Sequence[QueuedJob]:
        """See the port."""
        place = (model, consumer)
        limits = {
            Priority.INTERACTIVE: max_jobs,
            Priority.BATCH: max_jobs if max_batch_jobs is None else max_batch_jobs,
        }
        if adopted := await self._adopt_unseen(place, limits):
            return adopted
        self._claims_in_flight[place] += 1
        try:
            with self._doubting(place):
                rows = await self._reads.read(model, consumer, limits, block_s)
        finally:
            self._claims_in_flight[place] -= 1
        return await self._take(place, rows)

    async def peek(self, model: ModelName, *, max_jobs: int) -> Sequence[Job]:
        """See the port."""
        jobs: list[Job] = []
        for lane in LANES:
            arguments: list[Any] = [GROUP, max_jobs]
            ask = partial(self._peek, [self._key(model, lane)], arguments)
            for _, flat in await self._call(ask, attempts=2):
                # Whoever claims a malformed entry logs it.
                with contextlib.suppress(*_MALFORMED):
                    jobs.append(_job_from(dict(zip(flat[::2], flat[1::2], strict=True))))
        return jobs[:max_jobs]

    async def acknowledge(self, model: ModelName, entry_ids: Sequence[str]) -> None:
        """See the port."""
        if not entry_ids:
            return
        for lane, raw_ids in ids_by_lane(entry_ids).items():
            for start in range(0, len(raw_ids), _MOST_ACKNOWLEDGED):
                arguments: list[Any] = [GROUP, *raw_ids[start : start + _MOST_ACKNOWLEDGED]]
                remove = partial(self._acknowledge, [self._key(model, lane)], arguments)
                await self._call(remove, attempts=2)
        for (held_model, _), held in self._held.items():
            if held_model == model:
                held.difference_update(entry_ids)

    async def reclaim(
        self, model: ModelName, consumer: str, *, alive: frozenset[str], max_jobs: int
    ) -> Sequence[QueuedJob]:
        """See the port."""
        found: list[Row] = []
        place = (model, consumer)
        if adopted := await self._adopt_unseen(place, dict.fromkeys(LANES, max_jobs)):
            return adopted
        with self._doubting(place):
            for lane in LANES:
                arguments: list[Any] = [GROUP, consumer, max_jobs - len(found), *sorted(alive)]
                rows = await self._call(partial(self._reclaim, [self._key(model, lane)], arguments))
                found += [row_of(lane, row) for row in rows]
        return await self._take(place, found)

    async def cancel(self, model: ModelName, entry_id: str) -> bool:
        """See the port."""
        lane, raw_id = find_entry(entry_id)
        arguments: list[Any] = [GROUP, raw_id]
        return bool(await self._call(partial(self._cancel, [self._key(model, lane)], arguments)))

    async def contains(self, model: ModelName, entry_id: str) -> bool:
        """See the port."""
        lane, raw_id = find_entry(entry_id)
        ask = partial(self._redis.xrange, self._key(model, lane), raw_id, raw_id, count=1)
        return bool(await self._call(ask, attempts=2))

    async def holder(self, model: ModelName, entry_id: str) -> str | None:
        """See the port."""
        lane, raw_id = find_entry(entry_id)
        ask = partial(
            self._redis.xpending_range, self._key(model, lane), GROUP, raw_id, raw_id, count=1
        )
        try:
            rows = await self._call(ask, attempts=2)
        except NotFound:
            return None  # no group yet: nobody has claimed anything
        return cast("bytes", rows[0]["consumer"]).decode() if rows else None

    async def depth(self, model: ModelName) -> QueueDepth:
        """See the port."""
        counts = [
            await self._call(partial(self._depth, [self._key(model, lane)], [GROUP]), attempts=2)
            for lane in LANES
        ]
        length, claimed = map(sum, zip(*counts, strict=True))
        return QueueDepth(waiting=length - claimed, claimed=claimed)

    async def arrivals(self, model: ModelName) -> Arrivals:
        """See the port."""
        keys = self._keys(model)
        ask = partial(self._arrivals, keys, [GROUP])
        appended, waiting, newest = await self._call(ask, attempts=2)
        return Arrivals(appended, waiting, tuple(each.decode() for each in newest))

    async def wait_arrival(self, model: ModelName, since: Arrivals, *, block_s: float) -> bool:
        """See the port."""
        keys = self._keys(model)
        after = dict(zip(keys, since.newest, strict=True))
        block_ms = max(1, round(block_s * 1000))  # 0 would mean for ever
        read = partial(self._redis.xread, after, count=1, block=block_ms)
        return bool(await self._call(read, attempts=2, extra_s=block_s))

    async def drop(self, model: ModelName) -> None:
        """See the port."""
        keys = self._keys(model)
        await self._call(partial(self._redis.delete, *keys), attempts=2)
        for held_model, consumer in self._held:
            if held_model == model:
                self._held[held_model, consumer].clear()

    async def close(self) -> None:
        """Close all connections; blocked claims raise Unavailable."""
        self._is_closed = True
        self._wires.close()
        await self._redis.aclose()
        await self._redis.connection_pool.disconnect()

    def _doubt_claims(self) -> None:
        """Look again, at the next claim of each, what the server says that its consumer holds."""
        for place in self._claims_in_flight:
            self._doubt(place)

    def _doubt(self, place: tuple[ModelName, str]) -> None:
        now_s = time.monotonic()
        self._doubted_s.update(((place, lane), now_s) for lane in LANES)

    @contextlib.contextmanager
    def _doubting(self, place: tuple[ModelName, str]) -> Iterator[None]:
        """What ends with an error may have been given entries that nobody here has seen."""
        try:
            yield
        except BaseException:
            self._doubt(place)
            raise

    async def _adopt_unseen(
        self, place: tuple[ModelName, str], limits: dict[Priority, int]
    ) -> Sequence[QueuedJob]:
        """Return entries that are this consumer's as the server says, where that is in doubt."""
        doubts = {lane: self._doubted_s.get((place, lane)) for lane in LANES}
        if not any(doubts.values()) or self._claims_in_flight[place]:
            return ()
        model, consumer = place
        asked_s = time.monotonic()
        held = ids_by_lane(self._held[place])
        found: list[Row] = []
        settled: list[Priority] = []
        for lane, since_s in doubts.items():
            most = min(limits[lane], limits[Priority.INTERACTIVE] - len(found))
            if since_s is None or most <= 0:
                continue
            arguments: list[Any] = [GROUP, consumer, most, *sorted(held.get(lane, ()))]
            rows = await self._call(partial(self._adopt, [self._key(model, lane)], arguments))
            found += [row_of(lane, row) for row in rows]
            # The server may notice only now that the interrupted claim's connection is gone.
            if len(rows) < most and asked_s - since_s > self._settle_s:
                settled.append(lane)
        for lane in settled:
            if self._doubted_s.get((place, lane)) == doubts[lane]:  # else another call was broken
                del self._doubted_s[place, lane]
        return await self._take(place, found)

    async def _take(self, place: tuple[ModelName, str], rows: Sequence[Row]) -> Sequence[QueuedJob]:
        taken: list[QueuedJob] = []
        malformed: list[str] = []
        for lane, raw_id, deliveries, fields in rows:
            entry_id = name_entry(raw_id, lane)
            try:
                job = _job_from(fields)
            except _MALFORMED as error:
                malformed.append(entry_id)
                _log.warning(
                    "dropped a malformed queue entry",
                    extra={"model": place[0], "entry_id": entry_id, "error": str(error)},
                )
                continue
            taken.append(QueuedJob(entry_id, job, deliveries))
        with self._doubting(place):
            await self.acknowledge(place[0], malformed)
        self._held[place].update(entry.entry_id for entry in taken)
        return taken

    async def _call(
        self, operation: Callable[[], Awaitable[Any]], *, attempts: int = 1, extra_s: float = 0.0
    ) -> Any:
        """Run one command under its deadline; several attempts for idempotent commands only."""
        for attempt in range(attempts, 0, -1):
            if self._is_closed:
                raise Unavailable("the connection to the queue server is closed")
            try:
                async with asyncio.timeout(self._timeout_s + extra_s):
                    return await operation()
            except (exceptions.RedisError, TimeoutError, OSError) as error:
                if attempt == 1 or not isinstance(error, UNREACHABLE):
                    raise error_from_redis(error) from error
        raise AssertionError("attempts must be at least 1")

    def _keys(self, model: ModelName) -> Sequence[str]:
        return [self._key(model, lane) for lane in LANES]

    def _key(self, model: ModelName, lane: Priority) -> str:
        return stream_key(self._prefix, model, lane)


def _job_from(fields: dict[bytes, bytes]) -> Job:
    message = pb.Job()
    message.ParseFromString(fields[FIELD])
    return job_from_pb(message)
