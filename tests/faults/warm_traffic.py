"""Questions without a pause to models that are up, to see whether anything disturbs them."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from gearfall.client import AsyncClient
from tests.faults.fault_cluster import until

PROMPT = "12+34="


class WarmTraffic:
    """Asks without a pause and keeps what was answered and what failed."""

    def __init__(self, client: AsyncClient, *names: str) -> None:
        """`names`: models and cascades that are asked, each by one client at a time."""
        self._client = client
        self._names = names
        self.answers: dict[str, set[str]] = {name: set() for name in names}
        self.asked = 0
        self.failures: list[str] = []

    @asynccontextmanager
    async def flowing(self) -> AsyncIterator[None]:
        """Ask everything over and over; it has been warm since before."""
        for name in self._names:
            await self._ask(name)
        tasks = [asyncio.create_task(self._ask_for_ever(name)) for name in self._names]
        yield
        for task in tasks:
            task.cancel()
        for each in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(each, asyncio.CancelledError), each

    async def after_more(self, answers: int) -> None:
        """Return when so many more questions were answered or failed."""
        wanted = self.asked + answers

        async def look() -> int:
            return self.asked

        await until(look, lambda asked: asked >= wanted)

    async def _ask_for_ever(self, name: str) -> None:
        while True:
            await self._ask(name)

    async def _ask(self, name: str) -> None:
        try:
            answer = await self._client.generate(name, PROMPT, temperature=0.0, max_tokens=8)
        except Exception as error:  # whatever a client would see
            self.failures.append(f"{name}: {error!r}")
        else:
            self.answers[name].add(answer.text)
        self.asked += 1
