"""The launcher with stand-in services: tiny programs that keep the rules of the real ones."""

import asyncio
import contextlib
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from gearfall.core.errors import Conflict, InvalidRequest, Unavailable
from gearfall.infra.local.launcher import (
    CommandTable,
    LocalCluster,
    LocalClusterSettings,
    read_cluster_file,
    service_commands,
)
from gearfall.infra.local.supervised_process import (
    ProcessSpec,
    ProcessState,
    SupervisedProcess,
    restart_delay_s,
)

SERVES = """
import json, os, signal, sys
def stop(*_):
    open(sys.argv[1], "a").write(sys.argv[2] + "\\n")
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
print(json.dumps({"ready": True, "service": "x", "address": f"here:{os.getpid()}"}), flush=True)
while True:
    signal.pause()
"""
FAILS = "import sys; sys.exit('no accelerator here')"
BABBLES = "print('hello', flush=True); import signal; signal.pause()"
IS_SILENT = "import signal; signal.pause()"
IS_STUBBORN = """
import signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print('{"ready": true}', flush=True)
while True:
    signal.pause()
"""


def spec(directory: Path, program: str, name: str = "x", **settings: float) -> ProcessSpec:
    argv = (sys.executable, "-I", "-S", "-c", program, str(directory / "stopped"), name)
    return ProcessSpec(name, "x", argv, directory / f"{name}.log", **settings)  # type: ignore[arg-type]


def settings(directory: Path) -> LocalClusterSettings:
    return LocalClusterSettings(
        runtime_dir=directory / "run",
        data_dir=directory / "data",
        rest_listen="127.0.0.1:0",
        etcd_url="http://127.0.0.1:1",
        redis_url="redis://127.0.0.1:1",
    )


def table(directory: Path, *stages: Sequence[tuple[str, str]]) -> CommandTable:
    return lambda _: [[spec(directory, program, name) for name, program in s] for s in stages]


class Changes:
    """Told about changes; waits until something holds."""

    def __init__(self) -> None:
        self.event = asyncio.Event()

    def __call__(self) -> None:
        self.event.set()

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not holds():
                self.event.clear()
                await self.event.wait()


def is_alive(pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


@pytest.mark.parametrize(
    ("exits_s", "delay_s"),
    [
        ([], 0.2),
        ([100.0], 0.2),
        ([99.0, 100.0], 0.4),
        ([97.0, 98.0, 99.0, 100.0], 1.6),
        ([10.0, 20.0, 100.0], 0.2),
        ([90.0 + number for number in range(10)], 10.0),
    ],
)
def test_restarts_slow_down_with_each_recent_exit(exits_s, delay_s):
    assert restart_delay_s(exits_s, 100.0) == pytest.approx(delay_s)


async def test_a_process_is_started_again_after_it_was_killed(tmp_path):
    changes = Changes()
    process = SupervisedProcess(spec(tmp_path, SERVES), changes)
    await process.start()
    first = process.pid
    assert process.ready_line["address"] == f"here:{first}"
    os.kill(first, signal.SIGKILL)
    await changes.until(lambda: process.restarts == 1 and process.state is ProcessState.READY)
    assert process.pid not in (0, first)
    assert process.ready_line["address"] == f"here:{process.pid}"
    last = process.pid
    await process.stop()
    assert (process.state, process.pid) == (ProcessState.STOPPED, 0)
    assert not is_alive(last)
    assert (tmp_path / "stopped").read_text() == "x\n"


@pytest.mark.parametrize(
    ("program", "timeout_s", "message"),
    [
        (FAILS, 30.0, "no accelerator here"),
        (BABBLES, 30.0, "hello"),
        (IS_SILENT, 0.1, "not ready in time"),
    ],
    ids=["fails", "babbles", "is silent"],
)
async def test_a_process_that_does_not_come_up_says_why(tmp_path, program, timeout_s, message):
    process = SupervisedProcess(spec(tmp_path, program, ready_timeout_s=timeout_s))
    with pytest.raises(Unavailable, match=message):
        await process.start()
    assert process.pid == 0


async def test_a_process_that_ignores_the_request_to_stop_is_killed(tmp_path):
    process = SupervisedProcess(spec(tmp_path, IS_STUBBORN, stop_timeout_s=0.1))
    await process.start()
    pid = process.pid
    await process.stop()
    await process.stop()
    assert not is_alive(pid)


async def test_a_cluster_starts_in_order_describes_itself_and_stops_in_reverse(tmp_path):
    commands = table(tmp_path, [("s1", SERVES), ("s2", SERVES)], [("w", SERVES)], [("r", SERVES)])
    cluster = LocalCluster(settings(tmp_path), commands=commands)
    await cluster.start()
    facts = read_cluster_file(tmp_path / "run")
    assert facts == cluster.describe()
    assert facts.launcher_pid == os.getpid()
    assert facts.rest_address == cluster.rest_address != "127.0.0.1:0"
    assert [(fact.name, fact.state) for fact in facts.services] == [
        (name, "ready") for name in ("s1", "s2", "w", "r")
    ]
    assert all(fact.address == f"here:{fact.pid}" for fact in facts.services)
    assert (tmp_path / "run").stat().st_mode & 0o077 == 0
    assert (tmp_path / "run" / "cluster.json").stat().st_mode & 0o077 == 0
    await cluster.stop()
    await cluster.stop()
    stopped = (tmp_path / "stopped").read_text().split()
    assert stopped[:2] == ["r", "w"]
    assert set(stopped[2:]) == {"s1", "s2"}
    with pytest.raises(FileNotFoundError):
        read_cluster_file(tmp_path / "run")
    assert not any(is_alive(fact.pid) for fact in facts.services)


async def test_a_cluster_that_fails_to_start_leaves_nothing_behind(tmp_path):
    cluster = LocalCluster(
        settings(tmp_path), commands=table(tmp_path, [("s", SERVES)], [("w", FAILS)])
    )
    with pytest.raises(Unavailable, match=r"w ended before it was ready.*no accelerator here"):
        await cluster.start()
    assert (tmp_path / "stopped").read_text() == "s\n"
    assert not (tmp_path / "run" / "cluster.json").exists()
    again = LocalCluster(settings(tmp_path), commands=table(tmp_path))
    await again.start()
    await again.stop()


async def test_a_second_cluster_in_the_same_directory_is_refused(tmp_path):
    first = LocalCluster(settings(tmp_path), commands=table(tmp_path))
    await first.start()
    second = LocalCluster(settings(tmp_path), commands=table(tmp_path))
    with pytest.raises(Conflict):
        await second.start()
    assert read_cluster_file(tmp_path / "run") == first.describe()
    await first.stop()


def test_a_file_left_by_a_killed_launcher_is_no_cluster(tmp_path):
    (tmp_path / "cluster.json").write_text("{}")
    with pytest.raises(FileNotFoundError):
        read_cluster_file(tmp_path)


def test_a_cluster_without_nodes_is_refused(tmp_path):
    with pytest.raises(InvalidRequest):
        LocalCluster(LocalClusterSettings(tmp_path, tmp_path, nodes=0))


def test_children_end_with_a_launcher_that_is_killed(tmp_path):
    launcher = f"""
import asyncio
from dataclasses import replace
from pathlib import Path
from gearfall.infra.local.supervised_process import ProcessSpec, SupervisedProcess
async def main():
    argv = {spec(tmp_path, SERVES).argv!r}
    process = SupervisedProcess(ProcessSpec("x", "x", argv, Path({str(tmp_path / "log")!r})))
    await process.start()
    print(process.pid, flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""
    with subprocess.Popen([sys.executable, "-c", launcher], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child = os.pidfd_open(int(parent.stdout.readline()))
        try:
            assert select.select([child], [], [], 0)[0] == []
            parent.kill()
            assert select.select([child], [], [], 20)[0] == [child]
        finally:
            os.close(child)


@pytest.mark.parametrize("key", ["", "a,b"])
def test_an_api_key_that_could_not_be_passed_on_is_refused(tmp_path, key):
    with pytest.raises(InvalidRequest):
        LocalCluster(LocalClusterSettings(tmp_path, tmp_path, api_keys=("good", key)))


def test_the_real_commands_carry_the_settings(tmp_path):
    chosen = LocalClusterSettings(
        tmp_path, tmp_path / "data", nodes=2, workers_per_node=2, slots=5, etcd_url="http://e:1"
    )
    stages = [[command.name for command in stage] for stage in service_commands(chosen)]
    assert stages == [
        ["store-node-1", "store-node-2"],
        [f"worker-node-{node}-{number}" for node in (1, 2) for number in (1, 2)],
        ["scheduler"],
        ["router"],
    ]
    several = service_commands(replace(chosen, schedulers=2))[2]
    assert [command.name for command in several] == ["scheduler-1", "scheduler-2"]
    worker = service_commands(chosen)[1][0]
    assert worker.argv[1:3] == ("-m", "services.worker")
    assert worker.argv[worker.argv.index("--slots") + 1] == "5"
    assert worker.argv[worker.argv.index("--etcd") + 1] == "http://e:1"
    router = service_commands(replace(chosen, api_keys=("one", "two")))[3][0]
    assert router.environment["GEARFALL_API_KEY"] == "one,two"
    assert not {"one", "two"} & set(router.argv)


def test_router_and_workers_share_the_secret_and_only_by_environment(tmp_path):
    chosen = LocalClusterSettings(tmp_path, tmp_path, cluster_secret="hush")
    _, (worker,), _, (router,) = service_commands(chosen)
    assert worker.environment["GEARFALL_CLUSTER_SECRET"] == "hush"
    assert router.environment["GEARFALL_CLUSTER_SECRET"] == "hush"
    assert "hush" not in (*worker.argv, *router.argv, repr(chosen))
