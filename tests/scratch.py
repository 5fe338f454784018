"""Where tests write: one directory a session, with nothing of it left over.

Whatever a test starts gets its temporary directories inside of it, too. After a run in which all
passed, and after one that was ended from outside, it is gone; after a failure what is small in it
stays, such as logs, until three newer runs that failed or still go on are there.
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from gearfall.infra.local.ctrl_c import take_sigterm_as_ctrl_c

LARGE_BYTES = 2**20
"""From here on a file is a model or a state, not something to read after a failure."""
_DIRECTORY = pytest.StashKey[Path]()


def pytest_configure() -> None:
    """Let fixtures stop what they started when this run is ended from outside."""
    take_sigterm_as_ctrl_c()


@pytest.fixture(scope="session", autouse=True)
def scratch(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """TMPDIR of this session; what is left over in it at the end of a whole run fails it."""
    directory = tmp_path_factory.getbasetemp()
    request.config.stash[_DIRECTORY] = directory
    remove_what_the_dead_left(directory.parent)
    # A short name: sockets are made below it.
    temporary = tmp_path_factory.mktemp("t", numbered=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(temporary))
        patch.setattr(tempfile, "tempdir", None)
        # torch makes it by the way, below TMPDIR.
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(directory / "inductor"))
        yield temporary
    if request.session.exitstatus == pytest.ExitCode.INTERRUPTED:
        return
    left = sorted(path.name for path in temporary.iterdir())
    assert not left, f"left over in TMPDIR: {left}"


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> Iterator[None]:
    """Remove what pytest itself keeps after anything but a success: all of it, or what is large.

    Also where a fixture of the session fails while it is torn down, which is inside.
    """
    try:
        return (yield)
    finally:
        _remove_what_is_kept(session, exitstatus)


def _remove_what_is_kept(session: pytest.Session, exitstatus: int) -> None:
    directory = session.config.stash.get(_DIRECTORY, None)
    if directory is None or not directory.is_dir():
        return
    if exitstatus == pytest.ExitCode.INTERRUPTED:
        shutil.rmtree(directory, ignore_errors=True)
        return
    for path in directory.rglob("*"):
        if path.is_file() and not path.is_symlink() and path.stat().st_size >= LARGE_BYTES:
            path.unlink()


def remove_what_the_dead_left(root: Path) -> None:
    """Remove the directories of sessions whose process is gone, which pytest keeps for days."""
    for lock in root.glob("pytest-*/.lock"):
        with contextlib.suppress(FileNotFoundError, ValueError):  # it just ended, or just begins
            if _is_gone(int(lock.read_text())):
                shutil.rmtree(lock.parent, ignore_errors=True)


def _is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
