"""Admission: a limit on the choices that run at once, with an honest time to come back."""

from gearfall.core.errors import Overloaded

_SMOOTHING = 0.2
_FIRST_GUESS_S = 1.0
_MOST_S = 60.0


class Admission:
    """Counts running choices and remembers how long they take."""

    def __init__(self, max_choices: int) -> None:
        self.max_choices = max_choices
        self.running_choices = 0
        self._mean_duration_s = _FIRST_GUESS_S

    def enter(self, choices: int) -> None:
        """Admit `choices`; raise Overloaded with the time until that many are likely to be done."""
        free = self.max_choices - self.running_choices
        if choices > free:
            raise Overloaded(
                f"{self.running_choices} answers are being generated, the limit is "
                f"{self.max_choices}",
                retry_after_s=self._wait_s(choices - free),
            )
        self.running_choices += choices

    def leave(self, choices: int, duration_s: float) -> None:
        """Give back what `enter` took; `duration_s` since then."""
        self.running_choices -= choices
        assert self.running_choices >= 0
        self._mean_duration_s += _SMOOTHING * (duration_s - self._mean_duration_s)

    def _wait_s(self, missing: int) -> float:
        """By Little's law: the running choices end at the rate running / mean duration."""
        running = max(self.running_choices, 1)
        return min(max(self._mean_duration_s * missing / running, 0.1), _MOST_S)
