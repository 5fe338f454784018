"""`gearfall export`: the safetensors files that a checkpoint was made from, byte for byte."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from gearfall.checkpoint.directory import new_directory
from gearfall.checkpoint.export import export as export_checkpoint
from gearfall.checkpoint.reading import open_checkpoint
from gearfall.cli.connection import AsJson
from gearfall.cli.progress import bytes_bar
from gearfall.cli.render import bytes_text, print_json, print_table


def export(
    path: Annotated[Path, typer.Argument(help="Directory of a checkpoint.")],
    out: Annotated[Path, typer.Argument(help="Directory to make; must not be there.")],
    as_json: AsJson = False,
) -> None:
    """Verify a checkpoint and write its source's files again, byte for byte the same."""
    checkpoint = open_checkpoint(path)
    with (
        new_directory(out) as directory,
        bytes_bar(f"exporting {path.name}", quiet=as_json) as report,
    ):
        files = export_checkpoint(checkpoint, directory, report)
    if as_json:
        print_json({"path": str(out.absolute()), "files": [asdict(file) for file in files]})
        return
    print_table(
        str(out),
        ("file", "size>"),
        ((file.name, bytes_text(file.size_bytes)) for file in files),
    )
