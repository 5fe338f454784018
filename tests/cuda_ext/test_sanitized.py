"""The hostile-file tests again, on a build that reports every bad access and undefined step."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cuda_ext.test_driver_double import build_double

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "sanitize"
SANITIZERS = "address,undefined"
TESTS = [
    f"tests/gearfall/infra/{name}.py"
    for name in (
        "memory/test_native",
        "memory/test_native_refusals",
        "memory/test_pool_file",
        "memory/test_device",
        "kernels/test_cpu_kernels",
        "kernels/test_cpu_attention",
        "kernels/test_cpu_decoder",
        "kernels/test_cpu_rounded",
    )
]


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    """The environment for a child whose compiler, build tools and sanitizer runtime are found."""
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    environment = {**os.environ, "PATH": tools}
    libraries = [_find_library(name, environment) for name in ("libasan.so", "libstdc++.so")]
    return {
        **environment,
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONMALLOC": "malloc",
    }


def _find_library(name: str, environment: dict[str, str]) -> str:
    answer = _run(["c++", f"-print-file-name={name}"], environment).stdout.strip()
    if not Path(answer).is_absolute():
        pytest.skip(f"the compiler brings no {name}")
    return answer


def _run(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def _build(environment: dict[str, str]) -> Path:
    plain = {name: value for name, value in environment.items() if name != "LD_PRELOAD"}
    configure = ["cmake", "-S", ".", "-B", str(BUILD), "-G", "Ninja"]
    options = [f"-DGEARFALL_SANITIZE={SANITIZERS}", f"-DPython_EXECUTABLE={sys.executable}"]
    for command in (
        [*configure, *options],
        ["cmake", "--build", str(BUILD), "--target", "_cuda_ext"],
    ):
        done = _run(command, plain)
        assert done.returncode == 0, done.stdout
    (extension,) = BUILD.glob("_cuda_ext.*.so")
    return extension


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_native_code_under_sanitizers(environment: dict[str, str], tmp_path: Path) -> None:
    extension = _build(environment)
    child = {
        **environment,
        "GEARFALL_SANITIZED_EXT": str(extension),
        "LD_LIBRARY_PATH": str(build_double(tmp_path)),
    }
    plugin = ["-p", "tests.cuda_ext.sanitized_plugin", "-p", "no:cacheprovider"]
    flags = ["-q", "--capture=no", f"--basetemp={tmp_path / 'session'}"]
    done = _run([sys.executable, "-m", "pytest", *flags, *plugin, *TESTS], child)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout
