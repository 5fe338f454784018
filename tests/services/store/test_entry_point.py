"""A store's process may start programs: no thread of gRPC's wakes up in the child."""

import json
import os
import subprocess
import sys

PROCESS = """
import runpy, sys, types

def main():
    import asyncio, json, os
    from pathlib import Path
    import uvloop
    from gearfall.infra.net.grpc_server import start_server

    async def fork_while_serving():
        server = await start_server("127.0.0.1:0", lambda server: None, ())
        names = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(writer, str(len(os.listdir("/proc/self/task"))).encode())
            os._exit(0)
        os.waitpid(child, 0)
        await server.stop(0)
        return names.count("event_engine"), int(os.read(reader, 9))

    print(json.dumps(uvloop.run(fork_while_serving())))

sys.modules["services.store.main"] = module = types.ModuleType("services.store.main")
module.main = main
runpy.run_module("services.store", run_name="__main__")
"""


def test_a_forked_child_has_no_threads_of_grpcs():
    environment = {k: v for k, v in os.environ.items() if k != "GRPC_ENABLE_FORK_SUPPORT"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROCESS],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    grpc_threads, child_threads = json.loads(done.stdout)
    assert grpc_threads > 0
    assert child_threads == 1
