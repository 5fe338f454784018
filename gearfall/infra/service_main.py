"""What every main shares: flags with environment defaults, uvloop, signals, the ready line."""

import argparse
import asyncio
import gc
import json
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from typing import Literal

import uvloop

from gearfall.infra.failpoints import arm_failpoints
from gearfall.infra.history_log import close_history, open_history
from gearfall.infra.logs import configure_logging
from gearfall.infra.state.etcd_state import EtcdState
from gearfall.infra.state.etcd_tls import read_tls


class ServiceParser(argparse.ArgumentParser):
    """Flags that are also read from the environment: --log-level from GEARFALL_LOG_LEVEL."""

    def __init__(self, service: str) -> None:
        super().__init__(prog=f"python -m services.{service}", allow_abbrev=False)
        self.add_setting(
            "--etcd", default="http://127.0.0.1:2379", meaning="etcd URL, comma-separated"
        )
        self.add_setting("--etcd-ca", default="", meaning="PEM file: who signs etcd's certificate")
        self.add_setting("--etcd-cert", default="", meaning="PEM file: this client's certificate")
        self.add_setting("--etcd-key", default="", meaning="PEM file: its key")
        self.add_setting(
            "--etcd-server-name", default="", meaning="name in etcd's certificates, if another"
        )
        self.add_setting("--redis", default="redis://127.0.0.1:6379", meaning="Redis URL")
        self.add_setting("--listen", default="127.0.0.1:0", meaning="host:port of the gRPC server")
        self.add_setting("--advertise", default="", meaning="host:port that others reach it at")
        self.add_setting("--log-level", default="INFO", meaning="DEBUG, INFO, WARNING or ERROR")

    def add_setting(
        self,
        flag: str,
        *,
        default: str | int | float | None,
        meaning: str,
        parse: Callable[[str], object] = str,
    ) -> None:
        """Add `flag`; without it the environment's GEARFALL_<FLAG>, else `default`, holds."""
        variable = "GEARFALL_" + flag.strip("-").replace("-", "_").upper()
        # argparse passes a string default through `type`, so a bad variable is refused too.
        value = os.environ.get(variable, default)
        self.add_argument(flag, default=value, type=parse, help=f"{meaning} [{variable}]")


def open_state(flags: argparse.Namespace) -> EtcdState:
    """Return the cluster state that the flags name; InvalidRequest for TLS files that don't fit."""
    tls = read_tls(
        flags.etcd,
        ca=flags.etcd_ca,
        cert=flags.etcd_cert,
        key=flags.etcd_key,
        server_name=flags.etcd_server_name,
    )
    return EtcdState(flags.etcd, tls=tls)


def announce_ready(service: str, address: str, **fields: object) -> None:
    """Tell the launcher, by one JSON line on standard output, that the service serves.

    What was imported and built by then lives as long as the process: no garbage collection looks
    at it any more, which would hold everybody up for tens of milliseconds.
    """
    line = {"ready": True, "service": service, "address": address, "pid": os.getpid(), **fields}
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()
    gc.collect()
    gc.freeze()


class Stop(asyncio.Event):
    """Set when a service shall end; knows whether somebody waits for that."""

    is_awaited = False

    async def wait(self) -> Literal[True]:
        """Return when it is set."""
        self.is_awaited = True
        return await super().wait()


def run_service(
    service: str, log_level: str, main: Callable[[asyncio.Event], Awaitable[None]]
) -> None:
    """Run `main(stop)` on uvloop until it returns; SIGTERM and SIGINT set `stop`.

    Before `main` waits for that it is still starting, and is cancelled. The process exits with
    status 0 after an orderly stop and 1 after an error, or a cancellation that no signal asked
    for, which is logged.
    """
    configure_logging(service, log_level)
    arm_failpoints(service, os.environ)
    open_history(service, os.environ)

    async def supervised() -> None:
        stop, work = Stop(), asyncio.current_task()
        assert work is not None

        def end() -> None:
            if stop.is_awaited:
                stop.set()
            elif not work.cancelling():
                work.cancel()

        loop = asyncio.get_running_loop()
        for signum in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signum, end)
        try:
            await main(stop)
        except asyncio.CancelledError:
            if not work.cancelling():
                raise

    try:
        uvloop.run(supervised())
        close_history()
    except (Exception, asyncio.CancelledError):
        logging.getLogger(service).exception("service failed")
        sys.exit(1)
