"""What vLLM is told by its environment."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gearfall.core.errors import Unavailable
from services.worker.engine.vllm_library import visible_device

ENVIRONMENT = """
import os, sys, tempfile
from pathlib import Path
from services.worker.engine.vllm_library import set_environment
tempfile.gettempdir()
set_environment("cuda:1", 1, Path(sys.argv[1]))
print(os.environ["CUDA_VISIBLE_DEVICES"], os.environ["TMPDIR"], tempfile.gettempdir())
"""


@pytest.mark.parametrize(
    ("index", "visible", "device"),
    [
        (0, None, "0"),
        (2, None, "2"),
        (0, "3,5", "3"),
        (1, "3, 5", "5"),
        (1, "GPU-a,GPU-b", "GPU-b"),
    ],
)
def test_a_device_is_counted_among_those_that_an_operator_makes_visible(
    index: int, visible: str | None, device: str
) -> None:
    assert visible_device(index, visible) == device


def test_a_device_that_is_not_visible_is_refused() -> None:
    with pytest.raises(Unavailable, match="cuda:2"):
        visible_device(2, "3,5")


def test_a_process_that_knew_another_directory_for_its_files_uses_the_new_one(
    tmp_path: Path,
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ENVIRONMENT, str(tmp_path)],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "3,5"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["5", str(tmp_path), str(tmp_path)]
