"""`gearfall demo`: the whole way on real models: start, register, deploy, ask, compare.

`gearfall demo migrate` moves one answer between two workers while it is read.
"""

import asyncio
import importlib.util
import signal
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from gearfall.cli.connection import AsJson
from gearfall.cli.deploy import deployment_from_file
from gearfall.cli.models import register_with_progress
from gearfall.cli.render import console, print_json
from gearfall.client import Client
from gearfall.core.errors import NotFound
from gearfall.core.records import DeploymentRecord
from gearfall.demo import catalogue
from gearfall.demo.measure import DemoReport, measure, print_report
from gearfall.infra.launcher import LocalCluster, LocalClusterSettings

app = typer.Typer(
    help="Show it on real models, each time on a cluster of its own.",
    invoke_without_command=True,
    add_completion=False,
)


@app.callback()
def demo(
    context: typer.Context,
    questions: Annotated[int, typer.Option(min=20, help="Held-out questions to ask.")] = 1000,
    concurrency: Annotated[int, typer.Option(min=1, help="Questions on the way at once.")] = 4,
    keep: Annotated[bool, typer.Option(help="Leave the cluster up until Ctrl-C.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
    as_json: AsJson = False,
) -> None:
    """Start a cluster, ask three models and their cascade held-out questions, compare them."""
    if context.invoked_subcommand is not None:
        return
    if importlib.util.find_spec("openai") is None:
        raise NotFound("the questions are asked by OpenAI's client: pip install 'gearfall[demo]'")
    with tempfile.TemporaryDirectory(prefix="gearfall-demo-") as home:
        report = asyncio.run(
            _run(Path(home), questions, concurrency, keep=keep, out=out, quiet=as_json)
        )
    if as_json:
        print_json(asdict(report))


async def _run(
    home: Path, count: int, concurrency: int, *, keep: bool, out: Path | None, quiet: bool
) -> DemoReport:
    settings = LocalClusterSettings(
        runtime_dir=home / "run",
        data_dir=home / "data",
        rest_listen="127.0.0.1:0",
        grpc_listen="127.0.0.1:0",
    )
    cluster = LocalCluster(settings)
    try:
        with console.status("starting etcd, Redis, store, worker, scheduler, router"):
            await cluster.start()
        deployment = await asyncio.to_thread(prepare, cluster.grpc_address, quiet=quiet)
        systems = (*(stage.model for stage in deployment.stages), deployment.name)
        report = await measure(
            cluster.rest_address,
            systems,
            catalogue.demo_questions(count),
            concurrency=concurrency,
            quiet=quiet,
        )
        if not quiet:
            print_report(report)
        if out is not None:
            await asyncio.to_thread(_write, out, report)
        if keep:
            await _wait_for_interrupt(cluster.rest_address, deployment.name)
        return report
    finally:
        await cluster.stop()


def _write(path: Path, report: DemoReport) -> None:
    import json

    path.write_text(json.dumps(asdict(report), indent=2) + "\n")


def prepare(grpc_address: str, *, quiet: bool, api_key: str = "") -> DeploymentRecord:
    """Register the demo family and deploy its cascade; return the deployment."""
    with Client(grpc_address, api_key=api_key) as client:
        for name, path in catalogue.checkpoint_paths().items():
            register_with_progress(client, name, path, quiet=quiet)
        return client.deploy(deployment_from_file(catalogue.deployment_path()))


async def _wait_for_interrupt(rest_address: str, deployment: str) -> None:
    console.print("The cluster stays up until Ctrl-C. Try:")
    console.print(
        f"curl -s http://{rest_address}/v1/chat/completions -H 'Content-Type: application/json' "
        f'-d \'{{"model": "{deployment}", "messages": '
        '[{"role": "user", "content": "123456+654321"}]}\'',
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(signum, stop.set)
    await stop.wait()
