"""A reader of chunks that stops to tell how far it is until the test lets it go on."""

import threading
from collections.abc import Callable
from typing import Any

from gearfall.infra.memory.native import read_chunks

TIMEOUT_S = 30.0


class HeldReads:
    """Implements `ReadChunks`: real reads whose progress stands still after `hold_at` chunks."""

    def __init__(self, hold_at: int = 1) -> None:
        self.hold_at = hold_at
        self.is_held = threading.Event()
        self.may_go_on = threading.Event()

    def __call__(self, path: Any, *, on_progress: Callable[[int], None], **options: Any) -> Any:
        def progress(chunks: int) -> None:
            on_progress(min(chunks, self.hold_at) if not self.may_go_on.is_set() else chunks)
            self.is_held.set()
            assert self.may_go_on.wait(TIMEOUT_S), "nobody let the read go on"
            on_progress(chunks)

        return read_chunks(path, on_progress=progress, **options)
