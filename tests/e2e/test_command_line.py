"""The `gearfall` command against a running cluster, as a user types it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gearfall.demo import catalogue
from tests.cluster_host import ClusterHost

pytestmark = pytest.mark.usefixtures("demo_family")


@pytest.fixture
def gearfall(host: ClusterHost) -> Any:
    def run(*arguments: str, code: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "gearfall.cli", *arguments],
            env=os.environ | {"GEARFALL_SERVER": host.addresses["grpc"], "COLUMNS": "200"},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout if code == 0 else done.stdout + done.stderr

    return run


def test_an_answer_streams_and_says_who_gave_it(gearfall: Any) -> None:
    shown = gearfall("chat", "arith", "12+30")
    assert "42" in shown
    assert "by way of arith-small" in shown
    answer = json.loads(gearfall("chat", "arith", "12+30", "--json"))
    assert (answer["text"].strip(), answer["finish"]) == ("42", "stop")


def test_listings_show_the_models_and_speak_json(gearfall: Any) -> None:
    assert "arith-medium" in gearfall("models")
    listed = json.loads(gearfall("models", "--json"))
    assert {model["name"] for model in listed["models"]} >= set(catalogue.checkpoint_paths())
    replicas = json.loads(gearfall("ps", "--json"))
    assert all(replica["timeline"]["total_s"] > 0 for replica in replicas)
    status = json.loads(gearfall("status", "--json"))
    assert status["leader"]
    assert status["nodes"][0]["residency"]
    gearfall("ps")
    gearfall("status")


def test_why_explains_models_and_requests(gearfall: Any) -> None:
    request_id = json.loads(gearfall("chat", "arith", "12+30", "--json"))["request_id"]
    assert json.loads(gearfall("why", "arith-small", "--json"))["explanations"]
    assert "arith" in gearfall("why", request_id)
    assert "neither" in gearfall("why", "nothing-like-it", code=1)


def test_a_load_is_measured(gearfall: Any) -> None:
    report = json.loads(gearfall("bench", "arith-small", "--requests", "20", "--json"))
    assert (report["requests"], report["failed"]) == (20, 0)
    assert 0 < report["total_p50_s"] <= report["total_p99_s"]


def test_deployments_and_models_come_and_go(gearfall: Any) -> None:
    path = str(catalogue.checkpoint_path("arith-small"))
    gearfall("models", "register", "guest", path)
    flags = ["--max", "2", "--target-jobs", "4", "--target-queued-tokens", "900", "--spread"]
    command = ["deploy", "guests", "--stage", "guest:0.5", "--stage", "arith-large", *flags]
    stored = json.loads(gearfall(*command, "--keep-alive", "5", "--json"))
    kept = ("max_replicas", "keep_alive_s", "target_jobs", "target_queued_tokens", "spread")
    assert [stored[field] for field in kept] == [2, 5.0, 4, 900, True]
    listed = gearfall("models")
    assert "guests" in listed
    assert "4 jobs" in listed
    assert "spread" in listed
    gearfall("chat", "guest", "1+1")
    assert "Conflict" in gearfall("rm", "guest", code=1)
    gearfall("rm", "guests")
    assert json.loads(gearfall("rm", "guest", "--json")) == {"removed": "model", "name": "guest"}
    assert "NotFound" in gearfall("rm", "guest", code=1)


def test_a_converted_model_is_registered_by_its_url(gearfall: Any, tmp_path: Path) -> None:
    gearfall("convert", str(catalogue.checkpoint_path("arith-small")), str(tmp_path / "converted"))
    url = f"file://{tmp_path}/converted"
    (done,) = json.loads(gearfall("models", "register", "of-a-url", url, "--json"))
    assert done["name"] == "of-a-url"
    assert json.loads(gearfall("chat", "of-a-url", "1+1", "--json"))["text"]
    gearfall("rm", "of-a-url")


@pytest.mark.parametrize(
    "arguments",
    [
        ("deploy", "bad", "--stage", "no-such-model"),
        ("deploy", "bad", "--stage", "arith-small", "--stage", "arith-large"),
        ("deploy", "bad", "--stage", "arith-small:0.5"),
        ("deploy", "bad", "--stage", "arith-small:1.5", "--stage", "arith-large"),
        ("deploy", "bad", "--stage", "arith-small:0.5", "--stage", "arith-small"),
        ("deploy", "bad"),
        ("deploy", "arith-small", "--stage", "arith-large"),
        ("deploy", "bad", "--stage", "arith-large", "--min-replicas", "3"),
        ("deploy", "bad", "--stage", "arith-large", "--certainty", "gut-feeling"),
        ("deploy", "bad", "--stage", "bad"),
        ("deploy", "bad", "--stage", "arith"),
        ("deploy", "bad", "--stage", "arith-large", "--min", "2", "--max", "1"),
        ("deploy", "bad", "--stage", "arith-large", "--min", "-1"),
        ("deploy", "bad", "--stage", "arith-large", "--keep-alive", "nan"),
        ("deploy", "bad", "--stage", "arith-large", "--target-jobs", "-3"),
        ("deploy", "bad", "--stage", "arith-large", "--target-queued-tokens", "-3"),
        ("deploy", "bad", "--stage", "arith-large", "--label", "planet=mars"),
        ("deploy", "bad", "--stage", "arith-large", "--label", "planet"),
        ("deploy", "bad", "--stage", "arith-large", "--accelerators", "9"),
    ],
)
def test_a_deployment_that_cannot_work_is_refused(gearfall: Any, arguments: tuple[str]) -> None:
    error = json.loads(gearfall(*arguments, "--json", code=1))["error"]
    assert error["type"] in ("InvalidRequest", "NotFound", "Conflict")
    assert error["message"]
