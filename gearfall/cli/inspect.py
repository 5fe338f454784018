"""`gearfall inspect`: what a checkpoint holds, from its manifest alone."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from gearfall.checkpoint.reading import Checkpoint, open_checkpoint
from gearfall.cli.connection import AsJson
from gearfall.cli.render import bytes_text, console, print_json, print_table
from gearfall.core.checkpoint.manifest import Manifest, TensorEntry


def inspect(
    path: Annotated[Path, typer.Argument(help="Directory of a checkpoint.")],
    as_json: AsJson = False,
) -> None:
    """Show a checkpoint's facts, partitions and tensors. Reads and checks the manifest only."""
    checkpoint = open_checkpoint(path)
    if as_json:
        print_json(describe(checkpoint))
        return
    _print_facts(checkpoint)
    _print_partitions(checkpoint.manifest)
    _print_tensors(checkpoint.manifest)


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return everything but the checksums as plain values."""
    manifest = checkpoint.manifest
    return {
        "path": str(checkpoint.directory.absolute()),
        "digest": checkpoint.digest,
        "format_version": manifest.format_version,
        "kind": "model" if manifest.adapter is None else "adapter",
        "model": asdict(manifest.model),
        "adapter": None if manifest.adapter is None else asdict(manifest.adapter),
        "ranks": manifest.ranks,
        "size_bytes": manifest.size_bytes,
        "partitions": [
            {
                "file": partition.file,
                "size_bytes": partition.size_bytes,
                "chunk_bytes": partition.chunk_bytes,
                "chunks": len(partition.checksums),
            }
            for partition in manifest.partitions
        ],
        "tensors": [asdict(tensor) for tensor in manifest.tensors],
        "aliases": {alias.name: alias.target for alias in manifest.aliases},
        "files": {file.name: file.size_bytes for file in manifest.files},
        "source_files": {file.name: file.size_bytes for file in manifest.source_files},
        "source_revision": manifest.source_revision,
    }


def _print_facts(checkpoint: Checkpoint) -> None:
    manifest = checkpoint.manifest
    facts = manifest.model
    rows: list[tuple[str, object]] = [
        ("digest", checkpoint.digest),
        ("format version", manifest.format_version),
        ("architecture", facts.architecture),
        ("parameters", f"{facts.parameters:,}"),
        ("dtype", facts.dtype),
        ("layers, KV heads, head size", f"{facts.layers}, {facts.kv_heads}, {facts.head_dim}"),
        ("context, vocabulary", f"{facts.context_tokens}, {facts.vocabulary_size}"),
        ("size", bytes_text(manifest.size_bytes)),
        ("files", ", ".join(file.name for file in manifest.files)),
        ("made from", ", ".join(file.name for file in manifest.source_files[:4])),
    ]
    if manifest.adapter is not None:
        adapter = manifest.adapter
        rows[1:1] = [
            ("LoRA adapter of", adapter.base_digest),
            ("rank, alpha", f"{adapter.rank}, {adapter.alpha:g}"),
        ]
    print_table("checkpoint", ("", "value"), rows)


def _print_partitions(manifest: Manifest) -> None:
    print_table(
        "partitions",
        ("rank>", "file", "size>", "chunks>", "tensors>"),
        (
            (
                rank,
                partition.file,
                bytes_text(partition.size_bytes),
                len(partition.checksums),
                sum(tensor.partition == rank for tensor in manifest.tensors),
            )
            for rank, partition in enumerate(manifest.partitions)
        ),
    )


def _print_tensors(manifest: Manifest) -> None:
    entries_by_name = manifest.entries_by_name()
    aliases = {alias.name: alias.target for alias in manifest.aliases}
    print_table(
        "tensors, in load order",
        ("name", "dtype", "shape", "size>", "ranks"),
        (
            (
                name,
                entries[0].dtype,
                " x ".join(map(str, entries[0].full_shape)) or "scalar",
                bytes_text(entries[0].full_bytes),
                f"= {aliases[name]}" if name in aliases else _sharing(entries, manifest.ranks),
            )
            for name, entries in entries_by_name.items()
        ),
    )
    console.print(f"{len(entries_by_name)} tensors, {len(aliases)} of them another one's bytes")


def _sharing(entries: Sequence[TensorEntry], ranks: int) -> str:
    split = entries[0].split
    if split is not None:
        return f"split along {split.dimension}"
    if len(entries) == ranks:
        return "whole" if ranks == 1 else "whole in each"
    return f"whole in {', '.join(str(entry.partition) for entry in entries)}"
