"""Memory kept ready while things go wrong: killed, no memory to be had, many loads at once."""

import asyncio
import subprocess
import sys
import textwrap
import time
from pathlib import Path

from gearfall.core.errors import Conflict, NotFound, Overloaded, Unavailable
from gearfall.core.ids import ModelName
from gearfall.infra.memory.pool_lease import map_partition, take_lease
from services.store.tiers.spare_memory import SpareMemory
from tests.faults.memory_groups import MemoryGroup, memory_group
from tests.services.store.checkpoints import many_tensors
from tests.services.store.source_directories import write_source
from tests.services.store.stores import TIMEOUT_S, RunningStore, running_store

MIB = 2**20
FILLING = textwrap.dedent(
    """
    import signal
    from gearfall.infra.memory.native import PoolFile
    from services.store.tiers.spare_memory import SpareMemory

    class Told(PoolFile):
        def fault_in(self, step_bytes, stop=None):
            super().fault_in(step_bytes, stop)
            print(self.faulted_bytes, flush=True)

    spare = SpareMemory(2**30, rest_s=0.0, make=Told, free_memory=lambda: 2**40)
    spare.fit(2**30)
    spare.want([(2**28,)])
    signal.pause()
    """
)
LOADING = textwrap.dedent(
    """
    import os, resource, sys
    from pathlib import Path
    from services.store.tiers.spare_memory import SpareMemory

    beyond_bytes = int(sys.argv[1])
    if beyond_bytes:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * os.sysconf("SC_PAGE_SIZE") + beyond_bytes
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    spare = SpareMemory(2**30, rest_s=0.0)
    spare.fit(2**30)
    spare.want([(2**29,)])
    assert spare.wait_settled(30)
    spare.begin("m", 2**25, 2**30 - 2**25)
    with spare.allocate("m", 2**25) as file:
        faulted_bytes = file.faulted_bytes
        with file.memory() as memory:
            for offset in range(0, 2**25, 4096):
                memory[offset] = 1
        os.close(file.seal())
    spare.end("m", 2**30 - 2**25)
    spare.close()
    print("loaded into", faulted_bytes)
    """
)


def wait_freed(group: MemoryGroup) -> int:
    """Wait for the kernel to take a dead process's mounts down, which it tells nobody."""
    deadline_s = time.monotonic() + TIMEOUT_S
    while (held_bytes := group.shared_bytes()) > MIB and time.monotonic() < deadline_s:
        subprocess.run(["true"], check=True)
    return held_bytes


def test_killed_while_it_faults_in_the_machine_has_it_all_back():
    with memory_group() as group:
        process = group.start(FILLING)
        assert process.stdout is not None
        there_bytes = int(process.stdout.readline())
        held_bytes = group.shared_bytes()
        process.kill()
        process.communicate()
        left_bytes = wait_freed(group)
    assert there_bytes >= 64 * MIB
    assert held_bytes >= 64 * MIB
    assert left_bytes <= MIB


def test_a_control_group_with_little_memory_is_not_filled():
    """Without a look at its limit the first page beyond it would end the process."""
    with memory_group(256 * MIB) as group:
        process = group.start(LOADING, "0")
        output, errors = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode, output) == (0, "loaded into 0\n"), errors


def test_an_address_space_that_ends_costs_the_spare_alone():
    done = subprocess.run(
        [sys.executable, "-c", LOADING, str(256 * MIB)],
        check=False,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert (done.returncode, done.stdout) == (0, "loaded into 0\n"), done.stderr
    assert "no memory is kept ready" in done.stderr


async def lease_again(store: RunningStore, name: str, content: bytes) -> int:
    leases = 0
    for _ in range(12):
        try:
            done = (await store.load(name))[-1]
            lease = await take_lease(done.attach_socket, name, done.digest, "worker")
        except (Overloaded, Unavailable):
            continue  # the other two were faster
        with lease, map_partition(lease.partition_fds[0], lease.partition_sizes[0]) as mapping:
            assert mapping[:] == content
            leases += 1
    return leases


async def test_loads_evictions_and_refills_race(tmp_path: Path):
    """Room for two of three models, and no rest between a load and the refill."""
    async with running_store(tmp_path / "store", dram_bytes=14 * MIB) as store:
        pool = store.service.pool
        pool.allocator.close()
        spare = pool.allocator = SpareMemory(14 * MIB, least_bytes=1, rest_s=0.0)
        contents = {}
        for number, name in enumerate("abc"):
            source = write_source(tmp_path / name, many_tensors(5 + number, seed=10 * number))
            await store.register(name, source)
            contents[name] = store.service.ssd.get(ModelName(name)).partition_path(0).read_bytes()

        async def unload_again() -> None:
            for _ in range(40):
                for name in "abc":
                    try:
                        store.service.unload(name)
                    except (Conflict, NotFound):
                        await asyncio.sleep(0)
                pool.check()

        leases = await asyncio.gather(
            *(lease_again(store, name, content) for name, content in contents.items()),
            unload_again(),
        )
        assert sum(count for count in leases if count) >= 12
        pool.check()
        assert await asyncio.to_thread(spare.wait_settled, TIMEOUT_S)
        assert 0 <= spare.held_bytes <= pool.free_bytes
