"""`gearfall models`: list, register, train the demo family."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from gearfall.cli.connection import AsJson, Server, connect
from gearfall.cli.render import (
    as_dict,
    bytes_text,
    console,
    placing_text,
    print_json,
    print_table,
    readiness_text,
    stages_text,
    targets_text,
)
from gearfall.client import Client
from gearfall.core.ids import is_url
from gearfall.pb import common_pb2

app = typer.Typer(help="List, register and train models.", invoke_without_command=True)


@app.callback()
def list_models(context: typer.Context, server: Server = "", as_json: AsJson = False) -> None:
    """List registered models and deployments, cold ones included."""
    if context.invoked_subcommand is not None:
        return
    with connect(server) as client:
        reply = client.models()
    if as_json:
        print_json(as_dict(reply))
        return
    print_table(
        "models",
        ("name", "state", "parameters>", "size>", "context>", "base", "nodes", "digest"),
        (
            (
                model.name,
                readiness_text(model),
                f"{model.parameters / 1e6:.2f} M",
                bytes_text(model.size_bytes),
                model.context_tokens,
                model.base,
                ", ".join(model.nodes),
                model.digest[:12],
            )
            for model in reply.models
        ),
    )
    if reply.deployments:
        print_table(
            "deployments",
            ("name", "stages", "certainty", "replicas", "keep-alive>", "targets", "placed on"),
            (
                (
                    deployment.name,
                    stages_text(deployment),
                    deployment.certainty,
                    f"{deployment.min_replicas} to {deployment.max_replicas}",
                    f"{deployment.keep_alive_s:g} s",
                    targets_text(deployment),
                    placing_text(deployment),
                )
                for deployment in reply.deployments
            ),
        )


@app.command("register")
def register(
    name: Annotated[str, typer.Argument(help="Name to serve the model under.")],
    path: Annotated[
        str,
        typer.Argument(
            help="Hugging Face directory with safetensors, or the URL of a converted checkpoint."
        ),
    ],
    base: Annotated[
        str, typer.Option(help="Registered model that a LoRA adapter belongs to.")
    ] = "",
    server: Server = "",
    as_json: AsJson = False,
) -> None:
    """Convert a local Hugging Face directory, or a PEFT LoRA adapter's, into every live store.

    What is registered by a URL stays there: stores fetch it when it is asked for.
    """
    source = path if is_url(path) else Path(path).absolute()
    with connect(server) as client:
        registered = register_with_progress(client, name, source, base=base, quiet=as_json)
    if as_json:
        print_json(registered)


def register_with_progress(
    client: Client, name: str, path: Path | str, *, base: str = "", quiet: bool = False
) -> list[dict[str, Any]]:
    """Register and show one bar a node; return what each node's store made of it."""
    done: list[dict[str, Any]] = []
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, disable=quiet) as bars:
        tasks: dict[str, TaskID] = {}
        for progress in client.register_model(name, str(path), base=base):
            node = progress.node_id
            if node not in tasks:
                tasks[node] = bars.add_task(f"{name} on {node}")
            bars.update(
                tasks[node],
                description=f"{name} on {node}: {progress.phase}",
                completed=progress.done_bytes,
                total=max(progress.total_bytes, 1),
            )
            if progress.HasField("model"):
                done.append({"node": node} | _facts(progress.model))
    return done


def _facts(model: common_pb2.Model) -> dict[str, Any]:
    return {
        "name": model.name,
        "digest": model.digest,
        "architecture": model.architecture,
        "parameters": model.parameters,
        "size_bytes": model.size_bytes,
        "context_tokens": model.context_tokens,
    }


@app.command("train-demo")
def train_demo(
    out: Annotated[Path, typer.Option(help="Directory for the three checkpoints.")],
    seed: Annotated[int, typer.Option(help="Seed of weights and questions.")] = 0,
    quick: Annotated[bool, typer.Option(help="A few steps only, to try the way.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train the demo family from random weights, then print and save what it can do."""
    from gearfall.demo import evaluate, report, train

    directory = out.absolute()
    arguments = ["--out", str(directory), "--seed", str(seed)]
    train.main([*arguments, "--quick"] if quick else arguments)
    if quick:
        _say_quick(directory, as_json=as_json)
        return
    measured = evaluate.evaluate(directory)
    if as_json:
        print_json(asdict(measured))
    else:
        report.print_report(measured, console)
    if len(measured.chosen.planned.stages) == 1:
        text = json.dumps(asdict(measured), indent=2)
        (directory / "report.json").write_text(text)
        console.print("[red]No cascade of these models keeps the large one's accuracy.[/]")
        raise typer.Exit(1)
    evaluate.write_report(measured, directory)


def _say_quick(directory: Path, *, as_json: bool) -> None:
    if as_json:
        print_json({"checkpoints": str(directory), "is_evaluated": False})
    else:
        console.print(f"{directory}: a few steps teach nothing, so the models are not evaluated")
