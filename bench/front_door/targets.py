"""What the front-door bench drives: the floor, the peer and gearfall, each as real processes."""

import sys
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from bench.front_door.figures import FLOOR
from bench.front_door.instant_engine import TOKEN_VARIABLE
from bench.front_door.k6 import API_KEY, TOKEN
from bench.front_door.peers import Peers, litellm_spec
from bench.front_door.tiny_checkpoint import write_tiny_checkpoint
from gearfall.client import AsyncClient
from gearfall.demo.tokenizer import VOCABULARY
from gearfall.infra.local.launcher import LocalCluster, LocalClusterSettings, service_commands
from gearfall.infra.local.local_servers import free_ports
from gearfall.infra.local.supervised_process import ProcessSpec, SupervisedProcess

GEARFALL = "gearfall"
LITELLM = "litellm"
MODEL = "instant"
SLOTS = 128
"""Jobs at once: above the largest number of users, so that nobody waits for a slot."""
LOG_LEVEL = "WARNING"
"""As the peer's: neither logs a line for each request."""


@dataclass(frozen=True, slots=True)
class Target:
    """One thing to measure."""

    name: str
    address: str
    """host:port that serves /v1/chat/completions."""
    processes: Sequence[SupervisedProcess]
    """All that works for its answers."""

    @property
    def pids(self) -> Mapping[str, int]:
        """Process ids by name."""
        return {process.spec.service: process.pid for process in self.processes}

    @property
    def restarts(self) -> int:
        """Processes that died and were started again: 0 in a sound run."""
        return sum(process.restarts for process in self.processes)


async def start_targets(directory: Path, peers: Peers, stack: AsyncExitStack) -> Sequence[Target]:
    """Start every target that can be had; `stack` stops them."""
    backend = await _start(_backend_spec(directory), stack)
    backend_address = str(backend.ready_line["address"])
    targets = [Target(FLOOR, backend_address, (backend,))]
    if peers.litellm is not None:
        (port,) = free_ports(1)
        spec = litellm_spec(peers.litellm, directory, port, backend_address)
        litellm = await _start(spec, stack)
        targets.append(Target(LITELLM, f"127.0.0.1:{port}", (litellm, backend)))
    targets.append(await _start_gearfall(directory / GEARFALL, stack))
    return targets


async def _start_gearfall(directory: Path, stack: AsyncExitStack) -> Target:
    settings = LocalClusterSettings(
        runtime_dir=directory / "run",
        data_dir=directory / "data",
        rest_listen="127.0.0.1:0",
        grpc_listen="127.0.0.1:0",
        dram_bytes=64 * 2**20,
        slots=SLOTS,
        api_keys=(API_KEY,),
        log_level=LOG_LEVEL,
    )
    cluster = LocalCluster(settings, commands=instant_commands)
    stack.push_async_callback(cluster.stop)
    await cluster.start()
    checkpoint = directory / "checkpoint"
    write_tiny_checkpoint(checkpoint)
    async with AsyncClient(cluster.grpc_address, api_key=API_KEY) as client:
        async for _ in client.register_model(MODEL, str(checkpoint)):
            pass
    return Target(GEARFALL, cluster.rest_address, cluster.processes)


def instant_commands(settings: LocalClusterSettings) -> Sequence[Sequence[ProcessSpec]]:
    """Return the real services' commands, with the worker's engine replaced."""
    return [[_with_instant_engine(spec) for spec in stage] for stage in service_commands(settings)]


def _with_instant_engine(spec: ProcessSpec) -> ProcessSpec:
    if spec.service != "worker":
        return spec
    instant = "bench.front_door.instant_worker"
    argv = [instant if part == "services.worker" else part for part in spec.argv]
    token = {TOKEN_VARIABLE: str(VOCABULARY[TOKEN])}
    return replace(spec, argv=argv, environment={**spec.environment, **token})


def _backend_spec(directory: Path) -> ProcessSpec:
    return ProcessSpec(
        name="backend",
        service="backend",
        argv=(sys.executable, "-m", "bench.front_door.instant_backend"),
        log_path=directory / "backend.log",
    )


async def _start(spec: ProcessSpec, stack: AsyncExitStack) -> SupervisedProcess:
    process = SupervisedProcess(spec)
    stack.push_async_callback(process.stop)
    await process.start()
    return process
