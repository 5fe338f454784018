"""A long answer that moves from worker to worker while it is streamed, beside one left alone."""

import asyncio
import contextlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Protocol

from gearfall.client import AsyncClient, Finished, Started, TextDelta
from gearfall.client.request import Options
from gearfall.core.errors import Internal, NotFound, Unavailable
from gearfall.core.ids import DeploymentName, JobId, ModelName
from gearfall.core.records import DeploymentRecord, Stage
from gearfall.infra.net.worker_door import WorkerDoor
from gearfall.pb import common_pb2
from gearfall.pb import worker_pb2 as pb

MODEL = ModelName("arith-large")
DEPLOYMENT = DeploymentName("moving")
PROMPT = "123456+654321="
TOKENS = 230
"""Prompt and answer fill the model's context but for a few tokens."""
MOVES_AT = (50, 110, 170)
"""Tokens of the answer after which it is moved."""
OPTIONS = Options(
    # Sampled, so that a sampler's state that did not move along would show at once.
    temperature=0.8, seed=7, max_tokens=TOKENS, ignore_eos=True, logprobs=True
)  # fmt: skip
READY_S = 60.0
_LOOK_AGAIN_S = 0.02


@dataclass(frozen=True, slots=True)
class Move:
    """One migration, as its source saw it."""

    after_tokens: int
    """Of the answer that the client had when it was asked for."""
    source: str
    target: str
    path: str
    """tokens or kv."""
    rounds: int
    pause_s: float
    """From the source's last token to the target's first."""
    duration_s: float


@dataclass(frozen=True, slots=True)
class Reading:
    """One streamed answer."""

    token_ids: tuple[int, ...]
    text: str
    gaps_s: tuple[float, ...]
    """Between one message with tokens and the next."""
    epochs: int
    """Owners that the job had."""


@dataclass(frozen=True, slots=True)
class MigrationDemo:
    """The moved answer beside the undisturbed one."""

    moves: tuple[Move, ...]
    tokens: int
    same_tokens: int
    """Equal at the same place."""
    is_same: bool
    """All of both, text included, and one owner for each move and the first."""
    median_gap_s: float
    longest_gap_s: float
    undisturbed_median_gap_s: float
    undisturbed_longest_gap_s: float
    text: str


class Show(Protocol):
    """Where the demo is watched."""

    def write(self, text: str) -> None:
        """More of the answer has come."""
        ...

    def move(self, number: int, move: Move) -> None:
        """The answer comes from another worker now."""
        ...


async def run(
    client: AsyncClient, show: Show, *, moves_at: Sequence[int] = MOVES_AT
) -> MigrationDemo:
    """Stream the answer, move it at these tokens, and stream it again left alone.

    The model must be registered. Raises Unavailable when a move does not come about.
    """
    stage = (Stage(MODEL),)
    await client.deploy(DeploymentRecord(DEPLOYMENT, stage, min_replicas=2, max_replicas=2))
    addresses = await wait_ready(client)
    async with contextlib.AsyncExitStack() as stack:
        doors = {
            worker_id: await stack.enter_async_context(WorkerDoor(address))
            for worker_id, address in addresses.items()
        }
        mover = _Mover(doors, show)
        moved = await _read(client, show, mover, moves_at)
        alone = await _read(client, None, mover, ())
    return compare(moved, alone, mover.moves)


def compare(moved: Reading, alone: Reading, moves: Sequence[Move]) -> MigrationDemo:
    """Hold the two answers against each other, token by token."""
    pairs = zip(moved.token_ids, alone.token_ids, strict=False)
    return MigrationDemo(
        moves=tuple(moves),
        tokens=len(moved.token_ids),
        same_tokens=sum(ours == theirs for ours, theirs in pairs),
        is_same=(moved.token_ids, moved.text) == (alone.token_ids, alone.text)
        and moved.epochs == 1 + len(moves),
        median_gap_s=median(moved.gaps_s),
        longest_gap_s=max(moved.gaps_s),
        undisturbed_median_gap_s=median(alone.gaps_s),
        undisturbed_longest_gap_s=max(alone.gaps_s),
        text=moved.text,
    )


class _Mover:
    """Moves one request's job to whichever worker it is not on."""

    def __init__(self, doors: Mapping[str, WorkerDoor], show: Show) -> None:
        self._doors = doors
        self._show = show
        self.moves: list[Move] = []

    async def move(self, request_id: str, after_tokens: int) -> None:
        source, job_id = await self._find(request_id)
        target = next(worker_id for worker_id in self._doors if worker_id != source)
        reply = await self._doors[source].move(job_id, self._doors[target].address)
        move = Move(
            after_tokens=after_tokens,
            source=source,
            target=target,
            path=pb.MigrationPath.Name(reply.path).removeprefix("MIGRATION_PATH_").lower(),
            rounds=reply.rounds,
            pause_s=reply.pause_s,
            duration_s=reply.duration_s,
        )
        self.moves.append(move)
        self._show.move(len(self.moves), move)

    async def _find(self, request_id: str) -> tuple[str, JobId]:
        for worker_id, door in self._doors.items():
            for job in (await door.status()).jobs:
                if job.request_id == request_id:
                    return worker_id, JobId(job.job_id)
        raise NotFound(f"no worker runs request {request_id}")


async def _read(
    client: AsyncClient, show: Show | None, mover: _Mover, moves_at: Sequence[int]
) -> Reading:
    """Stream one answer; ask for each move once its tokens are there and the one before is done."""
    token_ids: list[int] = []
    times_s: list[float] = []
    text, epochs, request_id = "", 0, ""
    waits = list(moves_at)
    async with asyncio.TaskGroup() as tasks:
        moving: asyncio.Task[None] | None = None
        async for event in client.stream(DEPLOYMENT, PROMPT, **OPTIONS):
            match event:
                case Started():
                    request_id = event.request_id
                case TextDelta():
                    times_s.append(perf_counter())
                    token_ids += [each.token_id for each in event.logprobs]
                    text += event.text
                    if show is not None:
                        show.write(event.text)
                    if waits and len(token_ids) >= waits[0] and (moving is None or moving.done()):
                        waits.pop(0)
                        moving = tasks.create_task(mover.move(request_id, len(token_ids)))
                case Finished():
                    epochs = event.stages[-1].epochs
                case _:
                    pass
    if waits:
        raise Unavailable(f"the answer ended before {len(waits)} of its moves could begin")
    if len(times_s) < 2:
        raise Internal("the answer came in one piece")
    gaps_s = tuple(later - earlier for earlier, later in itertools.pairwise(times_s))
    return Reading(tuple(token_ids), text, gaps_s, epochs)


async def wait_ready(client: AsyncClient, workers: int = 2) -> dict[str, str]:
    """Return so many workers' addresses once each serves the model. Raises Unavailable."""
    try:
        async with asyncio.timeout(READY_S):
            while True:
                found = {
                    worker.worker_id: worker.address
                    for worker in (await client.status()).workers
                    for replica in worker.replicas
                    if (replica.model, replica.state) == (MODEL, common_pb2.REPLICA_STATE_READY)
                }
                if len(found) == workers:
                    return found
                await asyncio.sleep(_LOOK_AGAIN_S)
    except TimeoutError:
        raise Unavailable(f"{MODEL} was not ready on {workers} workers in {READY_S:g} s") from None
