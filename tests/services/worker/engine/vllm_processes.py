"""vLLM's own processes, as the kernel lists them."""

from pathlib import Path


def descendants(pid: int) -> list[int]:
    """Processes below one, as they are now."""
    found: list[int] = []
    for thread in Path(f"/proc/{pid}/task").iterdir():
        for child in (thread / "children").read_text().split():
            found += [int(child), *descendants(int(child))]
    return found


def name_of(pid: int) -> str:
    """What a process calls itself: `VLLM::EngineCore`, which it sets after a while."""
    return Path(f"/proc/{pid}/cmdline").read_text()
