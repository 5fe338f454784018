"""Owner of the process that computes canaries: started when one is asked for, ended when idle."""

import asyncio
import contextlib
import os
import subprocess
import sys

import msgspec

from gearfall.core.errors import DeadlineExceeded, InvalidRequest, Unavailable
from gearfall.core.generation.canary import MAX_CANARY_BYTES, Canary
from gearfall.infra.local.own_programs import python_path

IDLE_S = 30.0
"""How long it stays warm: importing transformers takes seconds, and models come in rows."""
_BASE_TIMEOUT_S = 120.0
_SLOWEST_BYTES_PER_S = 20e6


class CanaryRequest(msgspec.Struct, frozen=True):
    """Asks for the canary of what lies in a directory."""

    directory: str
    """A Hugging Face directory, or a checkpoint in the gearfall format."""
    vocabulary_size: int
    bos_token_id: int | None
    context_tokens: int


class CanaryReply(msgspec.Struct, frozen=True):
    """A canary, or why there is none."""

    canary: Canary | None = None
    error: str = ""


class CanaryProcess:
    """Computes one canary at a time in `services.store.models.canary_reference`."""

    def __init__(self, *, idle_s: float = IDLE_S) -> None:
        self._idle_s = idle_s
        self._turn = asyncio.Lock()
        self._process: asyncio.subprocess.Process | None = None
        self._idle: asyncio.TimerHandle | None = None

    @property
    def pid(self) -> int | None:
        """Process id, None while there is none."""
        return None if self._process is None else self._process.pid

    async def compute(self, request: CanaryRequest, size_bytes: int) -> Canary:
        """Return the canary. Raises InvalidRequest when transformers can't run the model,
        Unavailable when the process dies, DeadlineExceeded when it takes far too long.
        """
        async with self._turn:
            self._keep_warm()
            try:
                async with asyncio.timeout(_BASE_TIMEOUT_S + size_bytes / _SLOWEST_BYTES_PER_S):
                    reply = await self._ask(request)
            except TimeoutError:
                raise DeadlineExceeded("the canary was not computed in time") from None
            except BaseException:
                await self._end()
                raise
            self._idle = asyncio.get_running_loop().call_later(self._idle_s, self._close_input)
        if reply.canary is None:
            raise InvalidRequest(f"transformers can't run this model: {reply.error}")
        return reply.canary

    async def stop(self) -> None:
        """End the process. Idempotent."""
        self._keep_warm()
        await self._end()

    async def _ask(self, request: CanaryRequest) -> CanaryReply:
        if self._process is None or self._process.returncode is not None:
            self._process = await _start()
        reader, writer = self._process.stdout, self._process.stdin
        assert reader is not None
        assert writer is not None
        try:
            writer.write(msgspec.json.encode(request) + b"\n")
            await writer.drain()
            line = await reader.readline()
            return msgspec.json.decode(line, type=CanaryReply)
        except (OSError, ValueError) as error:
            raise Unavailable("the process that computes canaries died") from error

    async def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    def _keep_warm(self) -> None:
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None

    def _close_input(self) -> None:
        """End of input ends the process; the next request starts another."""
        process, self._process = self._process, None
        if process is not None and process.stdin is not None:
            process.stdin.close()


async def _start() -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "services.store.models.canary_reference"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        limit=MAX_CANARY_BYTES,
        env=os.environ | {"PYTHONPATH": python_path()},
    )
