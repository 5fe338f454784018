"""The processes of the engine bench's peers."""

import sys
from pathlib import Path

import pytest

from bench.engine.peers import PeerKind, PeerProcess


def test_a_peer_that_died_before_it_was_asked_is_said_to_have_ended(tmp_path: Path) -> None:
    kind = PeerKind("other", (sys.executable, "-c", "import sys; sys.exit(3)"), ("eager",))
    peer = PeerProcess(kind, tmp_path, 1, tmp_path / "log")
    peer._process.wait()
    with pytest.raises(RuntimeError, match="other ended with status 3"):
        peer.warm("eager")
    peer.stop()
