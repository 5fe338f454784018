"""The device tests over a driver of our own: the calls, their order and what is given back."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "tests" / "cuda_ext" / "driver_double.cpp"
TESTS = (
    "tests/gearfall/infra/memory/test_device.py",
    "tests/services/worker/engine/test_device.py",
)


def build_double(directory: Path, *flags: str) -> Path:
    """Build the driver's double as libcuda.so.1 in `directory`; return the directory."""
    library = directory / "libcuda.so.1"
    command = ["c++", "-std=c++17", "-shared", "-fPIC", *flags, f"-I{ROOT}/cuda_ext/src/loading"]
    done = subprocess.run(
        [*command, str(SOURCE), "-o", str(library), "-lrt"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return directory


def test_device_tests_over_the_double(tmp_path: Path) -> None:
    search = os.pathsep.join(
        filter(None, (str(build_double(tmp_path)), os.environ.get("LD_LIBRARY_PATH")))
    )
    basetemp = f"--basetemp={tmp_path / 'session'}"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", basetemp, *TESTS],
        cwd=ROOT,
        env={**os.environ, "LD_LIBRARY_PATH": search},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout


def test_an_unfit_library_is_refused(tmp_path: Path) -> None:
    """A libcuda.so.1 that lacks an entry point is an error, not a crash later."""
    empty = tmp_path / "empty.cpp"
    empty.write_text('extern "C" int cuInit(unsigned) { return 0; }\n')
    library = tmp_path / "libcuda.so.1"
    subprocess.run(["c++", "-shared", "-fPIC", str(empty), "-o", str(library)], check=True)
    script = (
        "from gearfall.core.errors import Unavailable\n"
        "from gearfall.infra.memory import native\n"
        "try:\n    native.cuda_device_count()\n"
        "except Unavailable as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "LD_LIBRARY_PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "the CUDA driver has no cuDeviceGetCount" in done.stdout, done.stderr
