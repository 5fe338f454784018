"""Converted checkpoints of any size for tests of what reads them from elsewhere."""

from pathlib import Path

from gearfall.checkpoint.conversion import convert
from gearfall.checkpoint.source import open_source
from gearfall.core.checkpoint.manifest import Manifest
from tests.services.store.source_directories import Tensors, random_tensor, write_source


def many_tensors(mebibytes: int, seed: int = 0) -> Tensors:
    """Tensors of 1 MiB each."""
    return {f"t{i}": random_tensor((2**20,), dtype="U8", seed=seed + i) for i in range(mebibytes)}


def write_checkpoint(
    directory: Path, tensors: Tensors | None = None, *, ranks: int = 1
) -> Manifest:
    """Convert a small source into a new `directory`."""
    source_directory = write_source(directory.with_name(f"{directory.name}-source"), tensors)
    directory.mkdir(parents=True)
    with open_source(str(source_directory)) as source:
        return convert(source, directory, lambda done, total: None, ranks=ranks)
