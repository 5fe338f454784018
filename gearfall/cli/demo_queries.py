"""`gearfall demo queries`: labelled questions of the demo, to profile its models with."""

import json
from pathlib import Path
from typing import Annotated

import typer

from gearfall.cli.render import console
from gearfall.demo import catalogue


def queries(
    out: Annotated[Path, typer.Argument(help="Where they go, a JSON object a line.")],
    count: Annotated[int, typer.Option(min=1, help="About so many.")] = 3000,
) -> None:
    """Write questions that no model of the demo was trained on, with their right answers."""
    lines = [
        json.dumps({"id": each.prompt, "prompt": each.prompt, "answer": each.answer})
        for each in catalogue.profile_questions(count)
    ]
    out.write_text("\n".join(lines) + "\n")
    console.print(f"{len(lines)} questions in {out}", highlight=False)
