"""`gearfall convert`: a directory of safetensors becomes a checkpoint, without a cluster."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from gearfall.checkpoint.adapter_source import is_adapter, open_adapter
from gearfall.checkpoint.conversion import convert as convert_source
from gearfall.checkpoint.directory import new_directory
from gearfall.checkpoint.reading import open_checkpoint
from gearfall.checkpoint.source import Source, open_source
from gearfall.cli.connection import AsJson
from gearfall.cli.progress import bytes_bar
from gearfall.cli.render import bytes_text, console, print_json
from gearfall.core.checkpoint.manifest import Manifest, manifest_bytes, manifest_digest
from gearfall.core.errors import InvalidRequest


def convert(
    source: Annotated[Path, typer.Argument(help="Hugging Face model or PEFT LoRA directory.")],
    destination: Annotated[Path, typer.Argument(help="Directory to make; must not be there.")],
    ranks: Annotated[
        int, typer.Option(min=1, help="Tensor-parallel ranks: one partition for each.")
    ] = 1,
    base: Annotated[
        Path | None, typer.Option(help="Converted checkpoint that a LoRA adapter belongs to.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Convert safetensors (one file, shards or a LoRA adapter) to the gearfall format."""
    with (
        _open(source, base) as opened,
        new_directory(destination) as directory,
        bytes_bar(f"converting {source.name}", quiet=as_json) as report,
    ):
        manifest = convert_source(opened, directory, report, ranks=ranks)
    digest = manifest_digest(manifest_bytes(manifest))
    if as_json:
        print_json(_facts(destination, manifest, digest))
        return
    console.print(
        f"{destination}: {len(manifest.tensors)} tensors, {bytes_text(manifest.size_bytes)} in "
        f"{manifest.ranks} partition(s), digest {digest}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


@contextlib.contextmanager
def _open(source: Path, base: Path | None) -> Iterator[Source]:
    path = str(source.absolute())
    if base is None:
        if is_adapter(source) and not (source / "config.json").exists():
            raise InvalidRequest("a LoRA adapter needs its base: name it with --base", param="base")
        with open_source(path) as opened:
            yield opened
        return
    checkpoint = open_checkpoint(base)
    with open_adapter(path, checkpoint.manifest, checkpoint.digest) as opened:
        yield opened


def _facts(destination: Path, manifest: Manifest, digest: str) -> dict[str, object]:
    return {
        "path": str(destination.absolute()),
        "digest": digest,
        "kind": "model" if manifest.adapter is None else "adapter",
        "ranks": manifest.ranks,
        "tensors": len(manifest.tensors),
        "aliases": len(manifest.aliases),
        "size_bytes": manifest.size_bytes,
    }
