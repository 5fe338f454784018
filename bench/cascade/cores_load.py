"""Asks one cluster of `bench.cascade cores`, in a process with the client of its own checkout.

Run by its path, so that `gearfall` is the other checkout's where that is asked for. It imports
nothing else of it. A line of JSON on standard input is a burst, one on standard output its end.
"""

import asyncio
import json
import sys
from typing import Any

from gearfall.client import AsyncClient


async def main(address: str) -> None:
    """Ask what comes on standard input, until its end."""
    async with AsyncClient(address) as client:
        while line := await asyncio.to_thread(sys.stdin.readline):
            await burst(client, json.loads(line))
            print("{}", flush=True)


async def burst(client: AsyncClient, wanted: dict[str, Any]) -> None:
    """Ask each prompt of `asks` when it is due, [seconds, prompt]; return after `seconds`."""

    async def ask(at_s: float, prompt: str) -> None:
        await asyncio.sleep(at_s)
        await client.generate(
            wanted["what"], prompt, max_tokens=wanted["max_tokens"], temperature=0.0
        )

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(asyncio.sleep(wanted["seconds"]))
        for at_s, prompt in wanted["asks"]:
            tasks.create_task(ask(at_s, prompt))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
