"""One router of `shift_time.py`, in a process of its own: told of load, it says when gears change.

Each line on standard input is a burst of that many tokens. Lines on standard output are JSON: what
happened, the gear, and when on the machine's monotonic clock, which all processes share.
"""

import argparse
import asyncio
import contextlib
import json
import logging
import sys
import time
from collections.abc import Sequence

import uvloop

from gearfall.core.gears.gear_shift import ShiftPolicy
from gearfall.core.ids import DeploymentName
from gearfall.infra.queue.redis_queue import RedisQueue
from gearfall.infra.state.cluster import Cluster
from gearfall.infra.state.etcd_state import EtcdState
from services.router.cluster.restoring import LASTING
from services.router.main import Router, RouterSettings

NAME = DeploymentName("shifting")
QUICK = ShiftPolicy(smoothing_s=0.05, dwell_s=0.3)
"""Down soon, for many shifts in little time; the way up is the default policy's."""


class _Wishes(logging.Handler):
    """Says when this router's own samples want another gear."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage() == "wants another gear":
            _say("wants", record.__dict__["gear"])


def main(argv: Sequence[str] | None = None) -> None:
    """Run until standard input ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--etcd", required=True)
    parser.add_argument("--redis", required=True)
    settings = parser.parse_args(argv)
    logging.getLogger("services.router.gears.gear_board").addHandler(_Wishes())
    logging.getLogger("services.router.gears.gear_board").setLevel(logging.INFO)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(settings))


async def _serve(settings: argparse.Namespace) -> None:
    async with contextlib.AsyncExitStack() as stack:
        state = EtcdState(settings.etcd)
        stack.push_async_callback(state.close)
        queue = RedisQueue(settings.redis)
        stack.push_async_callback(queue.close)
        cluster = Cluster(state, lasting=LASTING)
        await cluster.start()
        stack.push_async_callback(cluster.stop)
        router = Router(RouterSettings(shift_policy=QUICK), cluster, state, queue)
        await router.start()
        stack.push_async_callback(router.stop)
        watching = asyncio.create_task(_watch(router, cluster))
        lines = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(lines), sys.stdin
        )
        while line := await lines.readline():
            _say("burst", 0)
            router.gears.arrived(NAME, int(line))
        watching.cancel()


async def _watch(router: Router, cluster: Cluster) -> None:
    """Say each gear that `pin` gives, as soon as cluster state shows it."""
    last = -1
    async for _ in cluster.changes():
        pinned = router.gears.pin(NAME)
        if pinned is not None and pinned.index != last:
            last = pinned.index
            _say("pins", last)


def _say(what: str, gear: int) -> None:
    print(json.dumps({"what": what, "gear": gear, "at_s": time.monotonic()}), flush=True)


if __name__ == "__main__":
    main()
