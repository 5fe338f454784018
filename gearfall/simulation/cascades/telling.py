"""When an engine tells what its steps brought, as `engine/batching/gathering.py` has it.

What may wait is held back until something may not, or until the oldest of it would have waited
longer than `gather_s` at the end of one more step.
"""

from math import ceil

_EPSILON = 1e-9


class Telling:
    """Owner of how long an engine has held something back."""

    def __init__(self) -> None:
        self._held_since_s: float | None = None

    def steps_until(self, now_s: float, step_s: float, gather_s: float) -> int:
        """Return after how many steps, all of them so long, the next thing is told; at least 1."""
        oldest_s = now_s + step_s if self._held_since_s is None else self._held_since_s
        return max(1, ceil((oldest_s + gather_s - now_s) / step_s - 1.0 - _EPSILON))

    def pass_steps(self, now_s: float, steps: int, step_s: float, gather_s: float) -> bool:
        """Take in steps that begin now; return whether the last of them was told at its end."""
        first = self.steps_until(now_s, step_s, gather_s)
        if first > steps:
            if self._held_since_s is None:
                self._held_since_s = now_s + step_s
            return False
        self._held_since_s = None
        between = self.steps_until(now_s, step_s, gather_s)
        held = (steps - first) % between
        if held:
            self._held_since_s = now_s + (steps - held + 1) * step_s
        return not held

    def tell(self) -> None:
        """Everything is told now."""
        self._held_since_s = None
