"""How a program of ours finds our packages."""

import os
from pathlib import Path

import gearfall


def python_path() -> str:
    """Return a PYTHONPATH on which `services` lies beside the `gearfall` that runs here."""
    root = str(Path(gearfall.__file__).resolve().parents[1])
    return os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
