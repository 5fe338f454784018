"""Generate `gearfall/pb` from `protos/*.proto`: messages, gRPC stubs and their types.

The protos import each other by package path (`gearfall/pb/common.proto`); a virtual path mapping
lets protoc find them here, so that no generated import is rewritten.
"""

import argparse
import importlib.resources
import os
import shutil
import sys
import tempfile
from pathlib import Path

from grpc_tools import protoc

PACKAGE = Path("gearfall/pb")
ROOT = Path(__file__).resolve().parent.parent
GENERATED = ("*_pb2.py", "*_pb2.pyi", "*_pb2_grpc.py", "*_pb2_grpc.pyi")


def generate(protos: Path, out: Path) -> list[Path]:
    """Write the stubs of every proto in `protos` under `out/gearfall/pb`; return the files there.

    A file is replaced whole and only where its content differs, and a stub without a proto is
    removed: whoever imports the package meanwhile sees the old or the new one, never a part.
    """
    names = sorted(path.name for path in protos.glob("*.proto"))
    target = out / PACKAGE
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target, prefix=".gen-") as scratch:
        if names:
            _run_protoc(protos, Path(scratch), names)
        fresh = {path.name: path for path in (Path(scratch) / PACKAGE).glob("*")}
        for stale in _stubs_in(target):
            if stale.name not in fresh:
                stale.unlink()
        for name, path in fresh.items():
            _replace_if_changed(path, target / name)
    return _stubs_in(target)


def _run_protoc(protos: Path, out: Path, names: list[str]) -> None:
    well_known = importlib.resources.files("grpc_tools") / "_proto"
    arguments = [
        "protoc",
        f"-I{PACKAGE}={protos}",
        f"-I{well_known}",
        f"--plugin=protoc-gen-mypy={_find_plugin('protoc-gen-mypy')}",
        f"--plugin=protoc-gen-mypy_grpc={_find_plugin('protoc-gen-mypy_grpc')}",
        f"--python_out={out}",
        f"--grpc_python_out={out}",
        f"--mypy_out=quiet:{out}",
        f"--mypy_grpc_out=quiet:{out}",
        *(str(PACKAGE / name) for name in names),
    ]
    if protoc.main(arguments) != 0:
        sys.exit("protoc failed: see its messages above")


def _find_plugin(name: str) -> str:
    beside_python = str(Path(sys.executable).parent)
    path = os.pathsep.join([beside_python, os.environ.get("PATH", os.defpath)])
    found = shutil.which(name, path=path)
    if found is None:
        sys.exit(f"{name} not found: install mypy-protobuf (the `dev` extra has it)")
    return found


def _stubs_in(directory: Path) -> list[Path]:
    return sorted(path for pattern in GENERATED for path in directory.glob(pattern))


def _replace_if_changed(fresh: Path, target: Path) -> None:
    if not target.exists() or target.read_bytes() != fresh.read_bytes():
        fresh.replace(target)


def main() -> None:
    """Read the command line and generate."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--protos", type=Path, default=ROOT / "protos")
    parser.add_argument("--out", type=Path, default=ROOT, help="the folder that holds gearfall/pb")
    arguments = parser.parse_args()
    written = generate(arguments.protos.resolve(), arguments.out.resolve())
    print(f"gearfall/pb: {len(written)} files")


if __name__ == "__main__":
    main()
