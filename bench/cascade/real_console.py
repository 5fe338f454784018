"""Where the benches on the real system print: wide enough for their tables, in a pipe too."""

import time

from rich.console import Console

console = Console(width=max(Console().width, 150))


def say(what: str, began_s: float) -> None:
    """Print what was done and how long it took, on the monotonic clock."""
    console.print(f"{time.perf_counter() - began_s:6.1f} s  {what}", highlight=False)
