"""Shows and logs how far a training is: a progress bar for people, lines in a file for later."""

import platform
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TextIO

import torch
import transformers
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBars

LOG_EVERY_STEPS = 50


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the training of one model is."""

    model: str
    step: int
    steps: int
    loss: float
    """Mean cross-entropy of the answers' tokens in this step's batch, in nats."""
    elapsed_s: float


OnProgress = Callable[[Progress], None]


class TrainingReport:
    """An `OnProgress` that draws one bar for each model and writes every 50th step to `log`."""

    def __init__(self, log: TextIO) -> None:
        """Report to the terminal, if standard output is one, and to `log`."""
        self._log = log
        self._tasks: dict[str, TaskID] = {}
        self._bars = ProgressBars(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.4f}"),
            TimeRemainingColumn(),
        )

    def open(self, *, seed: int, threads: int) -> None:
        """Write what the run depends on: seed, threads, versions."""
        self._log.write(
            f"seed={seed} threads={threads} machine={platform.machine()}"
            f" torch={torch.__version__} transformers={transformers.__version__}\n"
        )

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bars.stop()

    def __call__(self, progress: Progress) -> None:
        """Record one step."""
        task = self._tasks.get(progress.model)
        if task is None:
            task = self._bars.add_task(progress.model, total=progress.steps, loss=progress.loss)
            self._tasks[progress.model] = task
        self._bars.update(task, completed=progress.step, loss=progress.loss)
        if progress.step % LOG_EVERY_STEPS == 0 or progress.step == progress.steps:
            self._log.write(
                f"{progress.model} step={progress.step}/{progress.steps}"
                f" loss={progress.loss:.4f} elapsed_s={progress.elapsed_s:.0f}\n"
            )
            self._log.flush()
