"""The environment of the loaders that gearfall is measured against."""

import json
import subprocess
import sys
from pathlib import Path

PEERS = ("runai-model-streamer", "fastsafetensors", "tensorizer")
BASE = ("torch>=2.6,<2.14", "transformers>=5.23,<6", "safetensors>=0.8,<1", "xxhash")


def prepare_peers(venv: Path) -> tuple[Path, dict[str, str]]:
    """Return the peers' python, installing what is absent, and what can't be installed and why."""
    python = venv / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check")
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
        subprocess.run([*pip, "install", "--quiet", *BASE], check=True)
    missing = {}
    for name in PEERS:
        if any(venv.glob(f"lib/python*/site-packages/{name.replace('-', '_')}-*.dist-info")):
            continue
        done = subprocess.run(
            [*pip, "install", "--quiet", name], capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            missing[name] = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
    return python, missing


def versions(python: Path) -> dict[str, str]:
    """Return the versions of the peers' packages."""
    names = ("torch", "transformers", "safetensors", *PEERS)
    program = (
        "import importlib.metadata as m, json, sys\n"
        "d = {x.metadata['Name'].lower(): x.version for x in m.distributions()}\n"
        "print(json.dumps({n: d[n] for n in sys.argv[1:] if n in d}))"
    )
    done = subprocess.run(
        [str(python), "-c", program, *names], capture_output=True, text=True, check=True
    )
    found: dict[str, str] = json.loads(done.stdout)
    return found
