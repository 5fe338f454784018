"""`gearfall demo`: the whole way on real models: register, profile, plan, deploy, ask, compare.

`gearfall demo migrate` moves one answer between two workers while it is read.
"""

import asyncio
import importlib.util
import signal
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from gearfall.cli.connection import AsJson
from gearfall.cli.deploy import deployment_from_file, deployment_of_plan
from gearfall.cli.models import register_with_progress
from gearfall.cli.plan import hosts_of, print_plan
from gearfall.cli.profile import measure_models
from gearfall.cli.render import console, print_json
from gearfall.client import Client
from gearfall.core.errors import NotFound
from gearfall.core.gears.gear_plan import GearPlan, plan_text
from gearfall.core.profile import Profile
from gearfall.core.records import DeploymentRecord
from gearfall.demo import catalogue
from gearfall.demo.measure import MAX_TOKENS, DemoReport, Planned, measure, print_report
from gearfall.infra.local.ctrl_c import take_sigterm_as_ctrl_c
from gearfall.infra.local.launcher import LocalCluster, LocalClusterSettings
from gearfall.profiling.measure import MeasureSettings
from gearfall.profiling.queries import LabelledQuery

DEPLOYMENT = "arith"
PROFILED_AT_ONCE = 32
PLANNED_LOAD = 600.0
"""Tokens a second: what a handful of questions at once come to. One gear: it is in force beyond,
too."""

app = typer.Typer(
    help="Show it on real models, each time on a cluster of its own.",
    invoke_without_command=True,
    add_completion=False,
)


@app.callback()
def demo(
    context: typer.Context,
    questions: Annotated[int, typer.Option(min=20, help="Held-out questions to ask.")] = 1000,
    profile_questions: Annotated[
        int, typer.Option(min=500, help="Other questions to profile the models with.")
    ] = 1500,
    loss: Annotated[
        float, typer.Option(help="Accuracy that the plan may lose to the large model, certified.")
    ] = 0.02,
    concurrency: Annotated[int, typer.Option(min=1, help="Questions on the way at once.")] = 4,
    keep: Annotated[bool, typer.Option(help="Leave the cluster up until Ctrl-C.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
    as_json: AsJson = False,
) -> None:
    """Start a cluster, plan a cascade of three models, compare it with each of them."""
    take_sigterm_as_ctrl_c()  # here for the subcommands, too
    if context.invoked_subcommand is not None:
        return
    if importlib.util.find_spec("openai") is None:
        raise NotFound("the questions are asked by OpenAI's client: pip install 'gearfall[demo]'")
    if importlib.util.find_spec("sklearn") is None:
        raise NotFound("the plan is made by scikit-learn: pip install 'gearfall[demo]'")
    settings = _Settings(questions, profile_questions, loss, concurrency, keep, as_json, out)
    with tempfile.TemporaryDirectory(prefix="gearfall-demo-") as home:
        report = asyncio.run(_run(Path(home), settings))
    if as_json:
        print_json(asdict(report))


@dataclass(frozen=True, slots=True)
class _Settings:
    """What the command was given."""

    questions: int
    profile_questions: int
    loss: float
    concurrency: int
    keep: bool
    quiet: bool
    out: Path | None


async def _run(home: Path, asked: _Settings) -> DemoReport:
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
        await asyncio.to_thread(register_family, cluster.grpc_address, quiet=asked.quiet)
        profile = await _profile(cluster.grpc_address, asked)
        plan = await asyncio.to_thread(_plan, cluster.grpc_address, profile, asked)
        report = await measure(
            cluster.rest_address,
            (*catalogue.MODELS, plan.name),
            catalogue.demo_questions(asked.questions),
            _planned(profile, plan),
            concurrency=asked.concurrency,
            quiet=asked.quiet,
        )
        if not asked.quiet:
            print_report(report)
        if asked.out is not None:
            await asyncio.to_thread(_write, asked.out, report)
        if asked.keep:
            await _wait_for_interrupt(cluster.rest_address, plan.name)
        return report
    finally:
        await cluster.stop()


def _planned(profile: Profile, plan: GearPlan) -> Planned:
    large = profile.model(catalogue.MODELS[-1]).generations
    promise = plan.gears[0].promise
    assert promise.loss_bound is not None, "the plan was asked for one"
    return Planned(promise.loss_bound, sum(each.cost for each in large) / len(large) / promise.cost)


async def _profile(grpc_address: str, asked: _Settings) -> Profile:
    """Measure the family with questions that the comparison does not ask."""
    queries = [
        LabelledQuery(question.prompt, question.prompt, question.answer)
        for question in catalogue.profile_questions(asked.profile_questions)
    ]
    settings = MeasureSettings(max_tokens=MAX_TOKENS, at_once=PROFILED_AT_ONCE)
    return await measure_models(
        grpc_address, catalogue.MODELS, queries, settings, quiet=asked.quiet
    )


def _plan(grpc_address: str, profile: Profile, asked: _Settings) -> GearPlan:
    """Plan the cascade and deploy the plan."""
    from gearfall.gears.plan_build import Target
    from gearfall.simulation.cascades.profile_plan import PlanRequest, plan_from_profile

    target = Target(loss=asked.loss)
    request = PlanRequest(DEPLOYMENT, 1, time.time(), target, loads=(PLANNED_LOAD,))
    with Client(grpc_address) as client:
        with console.status("planning"):
            plan = plan_from_profile(profile, hosts_of(client), request)
        client.deploy(deployment_of_plan(plan), gear_plan=plan_text(plan))
    if not asked.quiet:
        print_plan(plan, as_json=False)
    return plan


def _write(path: Path, report: DemoReport) -> None:
    import json

    path.write_text(json.dumps(asdict(report), indent=2) + "\n")


def prepare(grpc_address: str, *, quiet: bool, api_key: str = "") -> DeploymentRecord:
    """Register the demo family and deploy its cascade without gears; return the deployment."""
    register_family(grpc_address, quiet=quiet, api_key=api_key)
    with Client(grpc_address, api_key=api_key) as client:
        return client.deploy(deployment_from_file(catalogue.deployment_path()))


def register_family(grpc_address: str, *, quiet: bool, api_key: str = "") -> None:
    """Register the demo family's models."""
    with Client(grpc_address, api_key=api_key) as client:
        for name, path in catalogue.checkpoint_paths().items():
            register_with_progress(client, name, path, quiet=quiet)


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
