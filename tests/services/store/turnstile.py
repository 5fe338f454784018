"""Stands in the way of a load from elsewhere until the test lets it go on."""

import asyncio
from typing import Literal


class Turnstile(asyncio.Event):
    """Lets so many chunks of a load pass and the rest when it is opened, whatever is set."""

    def __init__(self, chunks: int) -> None:
        super().__init__()
        self.left = chunks
        self.is_open = asyncio.Event()

    async def wait(self) -> Literal[True]:
        self.left -= 1
        return self.left >= 0 or await self.is_open.wait()
