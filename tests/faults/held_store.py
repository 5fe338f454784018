"""A real store in a process of its own whose reads stand still.

`python -m tests.faults.held_store DIRECTORY MODEL` prints one JSON line when it serves.
"""

import asyncio
import json
import sys
from pathlib import Path

from gearfall.core.ids import ModelName
from tests.services.store.held_reads import HeldReads
from tests.services.store.stores import running_store


async def main(directory: str, model: str) -> None:
    """Serve until killed."""
    async with running_store(Path(directory), read=HeldReads()) as store:
        assert ModelName(model) in store.service.ssd.models
        sys.stdout.write(json.dumps({"address": store.service.address}) + "\n")
        sys.stdout.flush()
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
