"""Server-sent events of one running request, written once per decode step, without middlemen."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from typing import Any

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gearfall.core.errors import GearfallError, Internal
from services.router.doors.answer_facts import gearfall_of
from services.router.doors.openai_errors import error_body
from services.router.doors.rest_answers import DONE, AnswerShape
from services.router.generation import ChoiceEnd, GenerationEvent
from services.router.running_request import RunningRequest

PULSE_S = 15.0
"""After so long without anything a stream tells that it is alive: proxies cut silent ones after a
minute, and a client that died without a word is found out by that."""
_PULSE = b": still here\n\n"

_log = logging.getLogger(__name__)


class EventStream(Response):
    """Streams a running request; a client that goes away closes it."""

    media_type = "text/event-stream"

    def __init__(
        self,
        running: RunningRequest,
        batches: AsyncIterator[list[GenerationEvent]],
        first: Sequence[GenerationEvent],
        shape: AnswerShape,
        *,
        n: int,
        wants_usage: bool,
        headers: Mapping[str, str],
        pulse_s: float = PULSE_S,
    ) -> None:
        """`first`: the batch already taken from `batches`. `n`: choices of each prompt."""
        super().__init__(None, 200, {"cache-control": "no-cache", **headers})
        del self.headers["content-length"]
        self._running = running
        self._batches = batches
        self._first = first
        self._shape = shape
        self._n = n
        self._wants_usage = wants_usage
        self._pulse_s = pulse_s
        self._sent = 0
        """Messages so far."""

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        """Write the stream to its end, or until the client is gone."""
        watch = asyncio.create_task(self._watch(receive, send), name="client-watch")
        try:
            start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
            await send(start)
            async for chunk in self._chunks():
                self._sent += 1
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            watch.cancel()
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            watch.cancel()
            self._running.close()

    async def _watch(self, receive: Receive, send: Send) -> None:
        """Close the request when the client disconnects; break its silence until then."""
        while True:
            sent = self._sent
            try:
                async with asyncio.timeout(self._pulse_s):
                    return await close_when_gone(receive, self._running)
            except TimeoutError:
                if sent == self._sent:
                    await send({"type": "http.response.body", "body": _PULSE, "more_body": True})

    async def _chunks(self) -> AsyncIterator[bytes]:
        try:
            if chunk := self._chunk(self._first):
                yield chunk
            async for batch in self._batches:
                if chunk := self._chunk(batch):
                    yield chunk
        except GearfallError as error:
            yield b"data: " + orjson.dumps(error_body(error)) + b"\n\n" + DONE
        except Exception:
            _log.exception("a stream failed", extra={"request_id": self._running.request_id})
            body = error_body(Internal("internal error"))
            yield b"data: " + orjson.dumps(body) + b"\n\n" + DONE

    def _chunk(self, batch: Sequence[GenerationEvent]) -> bytes:
        parts = [self._shape.chunks(batch)]
        ended = [event for event in batch if isinstance(event, ChoiceEnd)]
        if not ended:
            return parts[0]
        is_over = len(self._running.ends) == self._running.choices
        for position, end in enumerate(ended):
            is_last = is_over and position == len(ended) - 1
            extra = self._described() if is_last and not self._wants_usage else None
            parts.append(self._shape.end_chunk(end, extra))
        if is_over:
            if self._wants_usage:
                usage = self._shape.usage_chunk(self._ends(), self._n, self._described())
                parts.append(usage)
            parts.append(DONE)
        return b"".join(parts)

    def _ends(self) -> list[ChoiceEnd]:
        return ends_in_order(self._running)

    def _described(self) -> dict[str, Any]:
        return {"gearfall": described(self._running)}


def ends_in_order(running: RunningRequest) -> list[ChoiceEnd]:
    """Return the ends of all choices that ended, by choice."""
    return [running.ends[choice] for choice in sorted(running.ends)]


def described(running: RunningRequest) -> dict[str, Any]:
    """Return the `gearfall` object of a request that ended."""
    described = gearfall_of(
        ends_in_order(running),
        request_id=running.request_id,
        deployment=running.deployment,
        seed=running.seed,
        expected_s=running.expected_start_s,
    )
    if running.cache:
        described["cache"] = running.cache
    return described | ({"gear": running.gear.label} if running.gear else {})


async def first_batch(
    receive: Receive, running: RunningRequest, pulse_s: float = PULSE_S
) -> tuple[list[GenerationEvent], AsyncIterator[list[GenerationEvent]]]:
    """Return the first batch and what yields those after it; raise what the request failed with.

    It is empty where none came within `pulse_s`: the stream is to be opened then, and tells what
    comes later, errors too. A client that goes away meanwhile closes the request.
    """
    batches = running.batches()
    no_more: list[GenerationEvent] = []
    coming = asyncio.ensure_future(anext(batches, no_more))
    watch = asyncio.create_task(close_when_gone(receive, running), name="client-watch")
    try:
        await asyncio.wait((coming,), timeout=pulse_s)
    finally:
        watch.cancel()
    if coming.done():
        return coming.result(), batches
    return [], _with_first(coming, batches)


async def _with_first(
    coming: Awaitable[list[GenerationEvent]], batches: AsyncIterator[list[GenerationEvent]]
) -> AsyncIterator[list[GenerationEvent]]:
    yield await coming
    async for batch in batches:
        yield batch


async def close_when_gone(receive: Receive, running: RunningRequest) -> None:
    """Close `running` when the client disconnects."""
    while (await receive())["type"] != "http.disconnect":
        pass
    running.close()
