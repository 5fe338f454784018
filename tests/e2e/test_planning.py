"""`gearfall profile` and `gearfall plan` on a real cluster, as a user types them."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import httpx
import pytest

from gearfall.client import AsyncClient
from gearfall.core.errors import Conflict
from gearfall.core.gears.gear_plan_checks import parse_plan
from gearfall.core.ids import DeploymentName
from gearfall.core.profile import parse_profile
from gearfall.core.records import DeploymentRecord
from gearfall.demo import catalogue
from gearfall.demo.arithmetic import ask
from gearfall.profiling.starts import measure_starts
from services.router.gears.shadow import is_drawn
from tests.cluster_host import ClusterHost

MODELS = ("arith-small", "arith-medium")
QUESTIONS = 80

pytestmark = pytest.mark.usefixtures("demo_family")


@pytest.fixture
def gearfall(host: ClusterHost) -> Callable[..., str]:
    def run(*arguments: object, code: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "gearfall.cli", *map(str, arguments)],
            env=os.environ | {"GEARFALL_SERVER": host.addresses["grpc"], "COLUMNS": "200"},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    return run


@pytest.fixture
def queries(tmp_path: Path) -> Path:
    draw, path = Random(5), tmp_path / "queries.jsonl"
    questions = [
        ask(draw.randrange(10**digits), "+", draw.randrange(10**digits))
        for digits in (1, 2, 3, 4)
        for _ in range(QUESTIONS // 4)
    ]
    lines = [json.dumps({"prompt": each.prompt, "answer": each.answer}) for each in questions]
    path.write_text("\n".join(lines))
    return path


def names_in(directory: Path) -> set[str]:
    """Files that are not empty."""
    return {path.name for path in directory.iterdir() if path.stat().st_size > 0}


def test_a_measured_family_becomes_a_plan(
    gearfall: Callable[..., str], host: ClusterHost, queries: Path, tmp_path: Path
) -> None:
    out, plan_path = tmp_path / "profile.json", tmp_path / "plan.json"
    report = ("--report", tmp_path / "report")
    drawn = ("--samples", 2)
    said = gearfall("profile", *MODELS, "--queries", queries, "--out", out, *drawn, *report)
    assert "80 queries" in said
    assert "least gap of two" in said
    assert "equal ones of 3 answers" in said
    profile = parse_profile(out.read_bytes())
    small, medium = (profile.model(name) for name in MODELS)
    for model in (small, medium):
        assert model.memory_bytes > 0
        assert model.slots > 0
        assert len(model.digest) == 32
        (speed,) = model.speeds.values()
        assert speed.step_s > 0.0
        assert all(len(each.logprobs) == each.output_tokens for each in model.generations)
        assert all(len(each.drawn) == 2 for each in model.generations)
    assert sum(g.cost for g in small.generations) < sum(g.cost for g in medium.generations)
    assert sum(g.quality for g in medium.generations) > 0.5 * QUESTIONS
    assert {f"reliability-{name}.svg" for name in MODELS} <= names_in(tmp_path / "report")
    asked = ("plan", out, "--name", "sums", "--requests", 100, "--out", plan_path)
    plots = ("--plots", tmp_path / "plots")
    shown = gearfall(*asked, "--p95", 60, "--load", 5, "--load", 20, *plots)
    assert "p95 <= 60 s" in shown
    assert {"front.svg", "front.png", "gears.svg", "gears.png"} <= names_in(tmp_path / "plots")
    plan = parse_plan(plan_path.read_bytes())
    for gear in plan.gears:
        assert len(gear.promise.agreement) == len(gear.stages) - 1
    assert (plan.name, plan.version, len(plan.gears)) == ("sums", 1, 2)
    assert plan.models.keys() <= set(MODELS)
    kept = tmp_path / "first.json"
    kept.write_bytes(plan_path.read_bytes())
    shown = gearfall(*asked, "--load", 5, "--samples", 3)
    assert "the same without stages that count equal answers" in shown
    assert parse_plan(plan_path.read_bytes()).version == 2
    assert "version: 1 -> 2" in gearfall("plan", "--diff", kept, plan_path)
    assert "sums version 1" in gearfall("plan", "--show", kept)
    gearfall("deploy", "--plan", plan_path)
    url = f"http://{host.addresses['rest']}/v1/completions"
    body = {"model": "sums", "prompt": "2+3=", "max_tokens": 4, "temperature": 0}
    answered = httpx.post(url, json=body, timeout=60)
    assert answered.json()["choices"][0]["text"] == "5"
    assert answered.headers["x-gearfall-gear"] == "2/0"
    assert "3 are needed" in gearfall(*asked, "--samples", 4, code=1)
    refused = gearfall(*asked, "--quality", 0.999, code=1)
    assert "at most" in refused
    gone = tmp_path / "gone.json"
    gone.write_text(plan_path.read_text().replace("arith-", "gone-"))
    assert "'gone-small' is not registered" in gearfall("deploy", "--plan", gone, code=1)


def test_answers_are_compared_afterwards_and_given_again(
    gearfall: Callable[..., str], host: ClusterHost
) -> None:
    stages = ("deploy", "checked", "--stage", "arith-small:0.5", "--stage", "arith-medium")
    assert "between 0 and 0.05" in gearfall(*stages, "--shadow-share", 0.2, code=1)
    gearfall(*stages, "--shadow-share", 0.05, "--cache-bytes", 1 << 20)
    url = f"http://{host.addresses['rest']}"

    def ask_for(model: str, request_id: str) -> httpx.Response:
        body = {"model": model, "prompt": "2+3=", "max_tokens": 4, "temperature": 0}
        headers = {"x-request-id": request_id}
        return httpx.post(f"{url}/v1/completions", json=body, headers=headers, timeout=60)

    assert ask_for("arith-medium", "warm").status_code == 200
    record = DeploymentRecord(DeploymentName("checked"), (), shadow_share=0.05)
    names = (f"q{number}" for number in range(1000))
    drawn = next(each for each in names if is_drawn(each, record, has_plan=False))
    first, again = ask_for("checked", drawn), ask_for("checked", "again")
    assert [each.headers["x-gearfall-cache"] for each in (first, again)] == ["miss", "hit"]
    assert [each.json()["choices"][0]["text"] for each in (first, again)] == ["5", "5"]
    assert (first.headers["x-gearfall-model"], again.json()["gearfall"]["cost_flops"]) == (
        "arith-small",
        0,
    )
    deadline_s = time.monotonic() + 30
    while "compared" not in gearfall("why", drawn):
        assert time.monotonic() < deadline_s, httpx.get(f"{url}/metrics").text
    assert "arith-medium answers the same" in gearfall("why", drawn)
    labels = 'cascade="arith-small:0.5,arith-medium",model="checked",outcome="agreed"'
    assert f"gearfall_shadow_answers_total{{{labels}" in httpx.get(f"{url}/metrics").text
    assert "follows no gear plan" in gearfall("why", "checked")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("profile",), "name models and --queries"),
        (("profile", "nobody", "--queries", "{queries}"), "nobody is not registered"),
        (("plan",), "name a profile"),
        (("plan", "{queries}"), "this is no profile"),
        (("plan", "--show", "{queries}"), "this is no gear plan"),
    ],
)
def test_bad_input_is_a_line_that_says_what_to_change(
    gearfall: Callable[..., str], queries: Path, arguments: tuple[str, ...], says: str
) -> None:
    filled = [each.format(queries=queries) for each in arguments]
    assert says in gearfall(*filled, code=1)


async def test_starts_are_measured_by_tier(client: AsyncClient) -> None:
    """The first start reads from SSD; a model that was let go comes back from DRAM."""
    path = str(catalogue.checkpoint_path("arith-small"))
    async for _ in client.register_model("let-go", path):
        pass
    await client.generate("let-go", "1+1=", max_tokens=1)
    found = await measure_starts(client, "let-go", 1)
    assert found.keys() == {"dram"}
    assert 0.0 < found["dram"] < 10.0
    assert "let-go" not in {each.name for each in (await client.models()).deployments}
    with pytest.raises(Conflict, match="arith-small is kept by arith"):
        await measure_starts(client, "arith-small", 1)
    await client.remove_model("let-go")
