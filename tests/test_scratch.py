"""What a test session leaves on the disk: nothing, or what helps to understand its failure."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.scratch import LARGE_BYTES

ROOT = Path(__file__).parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
RETENTION = [item for item in SETTINGS.items() if item[0].startswith("tmp_path_retention")]
WRITES = """
import tempfile
import pytest

@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    place = tmp_path_factory.mktemp("shared")
    (place / "model").write_bytes(bytes({large}))
    (place / "log").write_text("what happened")
    yield place
    assert (place / "log").exists()

def test_one(shared, tmp_path):
    (tmp_path / "model").write_bytes(bytes({large}))
    with tempfile.TemporaryDirectory() as name:
        pass
    {end}
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A TMPDIR for a session of its own."""
    directory = tmp_path / "tmp"
    directory.mkdir()
    return directory


def start(place: Path, end: str) -> subprocess.Popen[str]:
    """Start a session with one test, which does `end` at last."""
    test, settings = place.parent / "test_writes.py", place.parent / "pytest.ini"
    test.write_text(WRITES.format(large=LARGE_BYTES, end=end))
    settings.write_text("[pytest]\n" + "\n".join(f"{name} = {ours}" for name, ours in RETENTION))
    flags = ["-c", str(settings), "-s", "-p", "tests.scratch", "-p", "no:cacheprovider"]
    return subprocess.Popen(
        [sys.executable, "-m", "pytest", *flags, str(test)],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(place), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )


def end_of(session: subprocess.Popen[str]) -> str:
    said, _ = session.communicate(timeout=60)
    return said


def files_below(place: Path) -> set[str]:
    """The names of the files that a session left, pytest's own apart."""
    return {path.name for path in place.rglob("*") if path.is_file() and path.name != ".lock"}


def directories_of(place: Path) -> list[Path]:
    """What sessions wrote into and is there still."""
    return [path for path in place.glob("pytest-of-*/*") if not path.is_symlink()]


def test_a_session_that_passed_leaves_nothing(place: Path) -> None:
    session = start(place, "assert True")
    said = end_of(session)
    assert session.returncode == 0, said
    assert directories_of(place) == []


def test_a_session_that_failed_leaves_what_is_small(place: Path) -> None:
    session = start(place, "assert False")
    said = end_of(session)
    assert session.returncode == 1, said
    assert files_below(place) == {"log"}


@pytest.mark.parametrize(
    ("begun", "status"),
    [
        ("", pytest.ExitCode.INTERRUPTED),
        ("tempfile.mkdtemp(prefix='half-'); ", pytest.ExitCode.INTERRUPTED),
        ("(shared / 'log').unlink(); ", pytest.ExitCode.TESTS_FAILED),
    ],
    ids=["at rest", "amid something", "with a fixture that fails to end"],
)
def test_a_session_that_is_ended_leaves_nothing(place: Path, begun: str, status: int) -> None:
    session = start(place, f"{begun}print('here', flush=True); import time; time.sleep(100)")
    assert session.stdout is not None
    assert any("here" in line for line in session.stdout)
    assert "model" in files_below(place)
    session.terminate()
    said = end_of(session)
    assert session.returncode == status, said
    assert directories_of(place) == []


def test_a_killed_session_is_cleared_away_by_the_next(place: Path) -> None:
    session = start(place, "print('here', flush=True); import time; time.sleep(100)")
    assert session.stdout is not None
    assert any("here" in line for line in session.stdout)
    session.kill()
    end_of(session)
    assert files_below(place) == {"model", "log"}
    end_of(start(place, "assert True"))
    assert files_below(place) == set()


def test_what_a_failure_left_outlives_sessions_beside_each_other(place: Path) -> None:
    end_of(start(place, "assert False"))
    go = place.parent / "go"
    os.mkfifo(go)
    first = start(place, f"print('here', flush=True); open({str(go)!r}).read()")
    assert first.stdout is not None
    assert any("here" in line for line in first.stdout)
    second = start(place, "print('here', flush=True); import time; time.sleep(100)")
    assert second.stdout is not None
    assert any("here" in line for line in second.stdout)
    go.write_text("")
    said = end_of(first)
    assert first.returncode == 0, said
    second.terminate()
    end_of(second)
    assert files_below(place) == {"log"}


def test_what_is_left_over_in_tmpdir_fails_the_session(place: Path) -> None:
    session = start(place, "tempfile.mkdtemp(prefix='forgotten-')")
    said = end_of(session)
    assert session.returncode == 1, said
    assert "left over in TMPDIR: ['forgotten-" in said
