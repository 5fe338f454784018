"""An engine that answers at once: same messages as a real one, no process and no arithmetic."""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from gearfall.core.generation.job import FinishReason, TokenRun
from gearfall.core.ids import Epoch, JobId
from services.worker.engine.batching.gathering import Gathering
from services.worker.engine_link.kv_memory import KvMemory
from services.worker.engine_link.messages import (
    CancelJob,
    EngineReady,
    StartEngine,
    StepDone,
    StopEngine,
    SubmitJob,
    WorkerMessage,
)

TOKEN_VARIABLE = "GEARFALL_BENCH_TOKEN_ID"
"""Environment variable with the id of the token that the engine says."""
LOGPROB = -0.25
MARGIN = 2.0


@dataclass(slots=True)
class _Generation:
    next_index: int
    max_tokens: int


class InstantEngine:
    """Decodes one token of every running job in each step; implements `EngineProcess`.

    A step takes no time, but the event loop gets a turn after each, as between real steps. Tokens
    of whole answers wait for each other, as in a real one.
    """

    def __init__(self, token_id: int) -> None:
        """`token_id`: the only token it ever says."""
        self._token_id = token_id
        self.kv_memory: KvMemory | None = None
        self.arithmetic = ""
        """It caches nothing."""
        self._gathering = Gathering()
        self._running: dict[tuple[JobId, Epoch], _Generation] = {}
        self._changed = asyncio.Event()
        self._gone = asyncio.Event()

    @property
    def pid(self) -> int:
        """This process: there is no other."""
        return os.getpid()

    async def ready(self) -> EngineReady:
        """Return at once."""
        return EngineReady(pid=self.pid, attach_s=0.0, build_s=0.0, first_token_s=0.0, kv_bytes=0)

    def send(self, message: WorkerMessage) -> None:
        """Take a message as a real engine's loop would."""
        self._gathering.note(message)
        match message:
            case SubmitJob():
                self._running.setdefault(
                    (message.job_id, message.epoch),
                    _Generation(len(message.generated_token_ids), message.sampling.max_tokens),
                )
            case CancelJob():
                self._running.pop((message.job_id, message.epoch), None)
            case StopEngine():
                self._gone.set()
            case StartEngine():
                pass
        self._changed.set()

    async def send_with(self, message: WorkerMessage, _descriptors: Sequence[int]) -> None:
        """Take a message; it opens nothing."""
        self.send(message)

    async def __aiter__(self) -> AsyncIterator[StepDone]:
        """Yield steps while there are jobs; end when it was stopped or killed."""
        while not self._gone.is_set():
            if self._running:
                told = self._gathering.add(self._step(), time.monotonic())
                if told is not None:
                    yield told
                await asyncio.sleep(0)
            else:
                self._changed.clear()
                await self._changed.wait()

    async def wait_exit(self) -> None:
        """Return when it was stopped or killed."""
        await self._gone.wait()

    def kill(self) -> None:
        """End it now. Idempotent."""
        self._gone.set()
        self._changed.set()

    def _step(self) -> StepDone:
        runs = tuple(self._next_run(key) for key in tuple(self._running))
        return StepDone(runs=runs, running_jobs=len(self._running), waiting_jobs=0, step_s=0.0)

    def _next_run(self, key: tuple[JobId, Epoch]) -> TokenRun:
        generation = self._running[key]
        index = generation.next_index
        generation.next_index += 1
        is_last = generation.next_index >= generation.max_tokens
        if is_last:
            del self._running[key]
        return TokenRun(
            job_id=key[0],
            epoch=key[1],
            index=index,
            token_ids=(self._token_id,),
            logprobs=(LOGPROB,),
            margins=(MARGIN,),
            finish=FinishReason.LENGTH if is_last else None,
        )


class InstantSpawner:
    """Makes instant engines in this process; implements `EngineSpawner`."""

    def __init__(self, token_id: int) -> None:
        self._token_id = token_id

    async def spawn(self, start: StartEngine, partition_fds: Sequence[int]) -> InstantEngine:
        """Return an engine; the checkpoint stays unread."""
        del start, partition_fds
        return InstantEngine(self._token_id)
