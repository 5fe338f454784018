"""`python -m tests.compose.run`: build the image, start the cluster, test it, take it down.

Exits with pytest's status, or with 77 where there is no Docker engine and none can be started, or
no room on the disk; what is missing is printed. GEARFALL_DOCKER_DIR names a directory in which an
engine of its own keeps its images for the next run.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.cluster_host import OUTSIDE_VARIABLES
from tests.compose.compose_cluster import PROJECT_VARIABLE, ComposeCluster, compose_command
from tests.compose.docker_engine import (
    ForeignEngine,
    MissingError,
    OwnEngine,
    find_engine,
    require_room,
)
from tests.compose.images import ROOT, build_images, has_images

EXIT_SKIPPED = 77
NEEDED_BYTES = 8 * 10**9
"""Free disk from which on it is begun: what the images took while they were built, 4.7 GB where
layers share files (overlay2, CPU build of torch), and a margin."""
CLUSTER_BYTES = 3 * 10**9
"""The same where the engine has the images: what the running cluster took, 1.5 GB, doubled for what
is built anew of gearfall itself."""
DIRECTORY_VARIABLE = "GEARFALL_DOCKER_DIR"
TESTS = (
    "tests/e2e/test_whole_way.py",
    "tests/e2e/test_cold_start.py",
    "tests/e2e/test_bad_input.py",
    # Its directories are this machine's, and only its user's.
    "--deselect=tests/e2e/test_bad_input.py::test_a_bad_model_directory_is_refused",
    "tests/compose",
)


def main(arguments: Sequence[str]) -> int:
    """Run `arguments`, or all tests, against a cluster in containers; return the exit status."""
    try:
        compose_command()
        with _working_directory() as directory, _engine(directory / "engine") as engine:
            require_room(engine, CLUSTER_BYTES if has_images(engine.environment) else NEEDED_BYTES)
            with _timed("images"):
                build_images(engine.environment, keep_stages=_is_kept(engine))
            return _test(engine, arguments or TESTS)
    except MissingError as missing:
        print(f"SKIPPED: the cluster in containers was not tested; missing: {missing}")  # noqa: T201
        return EXIT_SKIPPED


def _test(engine: ForeignEngine | OwnEngine, arguments: Sequence[str]) -> int:
    cluster = ComposeCluster(engine.environment)
    with tempfile.TemporaryDirectory(prefix="gearfall-models-") as models:
        Path(models).chmod(0o755)  # the stores are another user
        try:
            with _timed("cluster"):
                _make_models(Path(models))
                cluster.up(Path(models))
            environment = {
                **os.environ,
                **engine.environment,
                **{OUTSIDE_VARIABLES[door]: address for door, address in cluster.doors.items()},
                PROJECT_VARIABLE: cluster.project,
            }
            argv = [sys.executable, "-m", "pytest", "--durations=10", *arguments]
            with _timed("tests"):
                status = subprocess.run(argv, env=environment, check=False, cwd=ROOT).returncode
            if status != 0:
                cluster.print_logs()
            return status
        finally:
            cluster.down()


def _make_models(directory: Path) -> None:
    """Write the model whose answers neither end nor repeat, in a process that ends with torch."""
    code = "import sys; from tests.compose.models import save; save(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(directory)], check=True, cwd=ROOT)


@contextlib.contextmanager
def _working_directory() -> Iterator[Path]:
    if kept := os.environ.get(DIRECTORY_VARIABLE):
        yield Path(kept).absolute()
        return
    directory = Path(tempfile.mkdtemp(prefix="gearfall-docker-"))
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


def _is_kept(engine: ForeignEngine | OwnEngine) -> bool:
    """Whether the engine's images outlive this run."""
    return isinstance(engine, ForeignEngine) or DIRECTORY_VARIABLE in os.environ


@contextlib.contextmanager
def _engine(directory: Path) -> Iterator[ForeignEngine | OwnEngine]:
    engine = find_engine(directory)
    try:
        yield engine
    finally:
        engine.stop()


@contextlib.contextmanager
def _timed(what: str) -> Iterator[None]:
    begin_s = time.monotonic()
    yield
    print(f"{what}: {time.monotonic() - begin_s:.0f} s", flush=True)  # noqa: T201


if __name__ == "__main__":
    # An end from outside takes the engine down too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main(sys.argv[1:]))
