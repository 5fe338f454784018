"""Writes the model that the compose tests register: answers that neither end nor repeat."""

import shutil
from pathlib import Path

from gearfall.demo import catalogue
from tests.e2e.test_migration import wanderer

WANDERER = "wanderer"
SEEN_BY_STORES = Path("/models")
"""Where the directory of models lies in a store's container."""


def save(directory: str) -> None:
    """Write the model below `directory`, readable by everybody."""
    folder = Path(directory, WANDERER)
    wanderer().save_pretrained(folder)
    shutil.copy(catalogue.checkpoint_path("arith-small") / "tokenizer.json", folder)
    for path in (folder, *folder.iterdir()):
        path.chmod(0o755 if path.is_dir() else 0o644)
