"""Tables and JSON that several commands print."""

import json
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any, TextIO

import typer
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from rich import box
from rich.console import Console
from rich.table import Table

from gearfall.pb import common_pb2

_UNBROKEN_WIDTH = 1_000
"""Columns of what goes into a pipe or a file: a row stays one line, for grep and awk."""


def line_width(stream: TextIO) -> int | None:
    """Return how long lines on a stream may be; None: as its terminal, or COLUMNS, has it."""
    return None if stream.isatty() or "COLUMNS" in os.environ else _UNBROKEN_WIDTH


console = Console(width=line_width(sys.stdout))


def as_dict(message: Message) -> dict[str, Any]:
    """Return a message as plain values, every field present, names as in the proto."""
    fields: dict[str, Any] = MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    return fields


def print_json(value: object) -> None:
    """Print one JSON document."""
    typer.echo(json.dumps(value, indent=2, default=str))


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table; columns whose name ends in '>' are right-aligned. The first one names the row
    and is not broken, unless a name would take more than a third of the line.
    """
    cells = [[str(cell) for cell in row] for row in rows]
    longest = max((len(row[0]) for row in cells), default=0)
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(
            column.rstrip(">"),
            justify="right" if column.endswith(">") else "left",
            overflow="fold",
            no_wrap=number == 0 and longest <= console.width // 3,
        )
    for row in cells:
        table.add_row(*row)
    console.print(table)


def bytes_text(count: float) -> str:
    """Return a size in binary units: 1.5 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def seconds_text(seconds: float) -> str:
    """Return a duration: 3.2 ms, 1.20 s."""
    return f"{seconds * 1000:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def readiness_text(model: common_pb2.Model) -> str:
    """Return cold, starting or ready, with the expected time to the first token."""
    name = common_pb2.ModelReadiness.Name(model.readiness).removeprefix("MODEL_READINESS_").lower()
    return name if name == "ready" else f"{name} ({seconds_text(model.expected_start_s)} to start)"


def stages_text(deployment: common_pb2.Deployment) -> str:
    """Return a cascade in one line: small <0.90> large; small*3: of three answers."""
    parts = []
    for stage in deployment.stages:
        several = f"*{stage.self_consistency.samples}" if stage.self_consistency.samples else ""
        bound = f" <{stage.threshold:.3f}>" if stage.HasField("threshold") else ""
        parts.append(stage.model + several + bound)
    return " ".join(parts)


def targets_text(deployment: common_pb2.Deployment) -> str:
    """Return what one replica should have to do at most: 8 jobs, 4000 queued tokens."""
    parts = [f"{deployment.target_jobs} jobs"] if deployment.target_jobs else []
    if deployment.target_queued_tokens:
        parts.append(f"{deployment.target_queued_tokens} queued tokens")
    return ", ".join(parts)


def placing_text(deployment: common_pb2.Deployment) -> str:
    """Return where replicas may be: 2 accelerators, zone=a, spread."""
    parts = [f"{deployment.accelerators} accelerators"] if deployment.accelerators > 1 else []
    parts += [f"{key}={value}" for key, value in sorted(deployment.labels.items())]
    return ", ".join([*parts, "spread"] if deployment.spread else parts)
