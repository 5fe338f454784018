"""`gearfall verify`: every byte of a checkpoint against its manifest."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from gearfall.checkpoint.reading import open_checkpoint
from gearfall.checkpoint.verification import Verification
from gearfall.checkpoint.verification import verify as verify_checkpoint
from gearfall.cli.connection import AsJson
from gearfall.cli.progress import bytes_bar
from gearfall.cli.render import bytes_text, console, print_json


def verify(
    path: Annotated[Path, typer.Argument(help="Directory of a checkpoint.")],
    as_json: AsJson = False,
) -> None:
    """Read every chunk and file, name those that are damaged; exit with 1 if there are any."""
    checkpoint = open_checkpoint(path)
    with bytes_bar(f"verifying {path.name}", quiet=as_json) as report:
        found = verify_checkpoint(checkpoint, report)
    if as_json:
        print_json(asdict(found) | {"sound": not found.damages})
    else:
        _print(found)
    if found.damages:
        raise typer.Exit(1)


def _print(found: Verification) -> None:
    for damage in found.damages:
        console.print(f"[red]damaged[/] {damage}", highlight=False, soft_wrap=True)
    verdict = f"[red]{len(found.damages)} damaged[/]" if found.damages else "[green]sound[/]"
    console.print(
        f"{verdict}: {bytes_text(found.size_bytes)} in {found.chunks} chunks and {found.files} "
        f"files, digest {found.digest}",
        highlight=False,
        soft_wrap=True,
    )
