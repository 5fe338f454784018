"""The generator on toy protos: imports by package path, stale stubs, files left alone."""

import subprocess
import sys
from pathlib import Path

import pytest

GENERATE = Path(__file__).resolve().parents[2] / "protos" / "generate.py"

COMMON = 'syntax = "proto3"; package toy.v1; message Job { string id = 1; }'
WORKER = """
syntax = "proto3";
package toy.v1;
import "gearfall/pb/common.proto";
service Worker { rpc Push(stream Job) returns (stream Job); }
"""


@pytest.fixture
def protos(tmp_path: Path) -> Path:
    folder = tmp_path / "protos"
    folder.mkdir()
    (folder / "common.proto").write_text(COMMON)
    (folder / "worker.proto").write_text(WORKER)
    return folder


def generate(protos: Path) -> subprocess.CompletedProcess[str]:
    out = protos.parent / "out"
    command = [sys.executable, str(GENERATE), "--protos", str(protos), "--out", str(out)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def stubs(protos: Path) -> dict[str, Path]:
    return {path.name: path for path in (protos.parent / "out/gearfall/pb").iterdir()}


def test_messages_stubs_and_types_import_each_other_by_package_path(protos: Path) -> None:
    done = generate(protos)
    assert done.returncode == 0, done.stderr
    written = stubs(protos)
    assert set(written) == {
        f"{name}_pb2{kind}"
        for name in ("common", "worker")
        for kind in (".py", ".pyi", "_grpc.py", "_grpc.pyi")
    }
    assert "from gearfall.pb import common_pb2" in written["worker_pb2_grpc.py"].read_text()


def test_a_second_run_touches_only_what_changed(protos: Path) -> None:
    generate(protos)
    before = {name: path.stat().st_ino for name, path in stubs(protos).items()}
    (protos / "common.proto").write_text(COMMON.replace("id = 1", "name = 1"))
    generate(protos)
    after = {name: path.stat().st_ino for name, path in stubs(protos).items()}
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"common_pb2.py", "common_pb2.pyi"}


def test_stubs_without_a_proto_go(protos: Path) -> None:
    generate(protos)
    (protos / "worker.proto").unlink()
    generate(protos)
    assert all(name.startswith("common_") for name in stubs(protos))


def test_a_broken_proto_fails_and_leaves_the_old_stubs(protos: Path) -> None:
    generate(protos)
    (protos / "common.proto").write_text("nonsense")
    done = generate(protos)
    assert done.returncode != 0
    assert "common.proto" in done.stderr
    assert len(stubs(protos)) == 8
