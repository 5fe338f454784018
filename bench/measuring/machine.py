"""What a figure was measured on and with."""

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path

OURS = ("grpcio", "redis", "uvicorn", "uvloop", "starlette", "msgspec", "orjson", "protobuf")


def machine_facts() -> Mapping[str, object]:
    """Return processor, cores, kernel, Python and the load average at this moment."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "load_average": [round(value, 2) for value in os.getloadavg()],
    }


def our_versions() -> Mapping[str, str]:
    """Return the commit that runs here and the packages that its front door stands on."""
    return {"gearfall": _commit(), **{name: importlib.metadata.version(name) for name in OURS}}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except FileNotFoundError:
        return platform.processor() or "unknown"
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "unknown")


def _commit() -> str:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or "unknown"
