"""The real worker, with an engine that answers at once.

`python -m bench.front_door.instant_worker` takes the worker's own flags. Store, lease, queue,
claims, push streams and replica records are the real ones; only the engine process and the zygote
that would fork it are replaced.
"""

import argparse
import asyncio
import os
from contextlib import AsyncExitStack

from bench.front_door.instant_engine import TOKEN_VARIABLE, InstantSpawner
from gearfall.infra.service_main import announce_ready, run_service
from services.worker.main import parse_settings, start_worker


def main() -> None:
    """Run the worker until it is told to stop."""
    settings = parse_settings()
    token_id = int(os.environ[TOKEN_VARIABLE])
    run_service("worker", settings.log_level, lambda stop: serve(settings, token_id, stop))


async def serve(settings: argparse.Namespace, token_id: int, stop: asyncio.Event) -> None:
    """Serve until `stop` is set."""
    async with AsyncExitStack() as stack:
        record = (await start_worker(settings, InstantSpawner(token_id), stack)).record
        announce_ready("worker", record.address, worker_id=record.worker_id)
        await stop.wait()


if __name__ == "__main__":
    main()
