"""The compose file against what the services understand; no engine is needed."""

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from services.router.main import parse_settings as parse_router
from services.scheduler.main import parse_settings as parse_scheduler
from services.store.main import parse_flags as parse_store
from services.worker.main import parse_settings as parse_worker

FOLDER = Path(__file__).parents[2] / "deploy/compose"
SERVICES: Mapping[str, Any] = yaml.safe_load((FOLDER / "compose.yml").read_text())["services"]
PARSERS: Mapping[str, Callable[[list[str]], Any]] = {
    "router": parse_router,
    "scheduler": parse_scheduler,
    "store": parse_store,
    "worker": parse_worker,
}
OURS = [name for name in SERVICES if name not in {"etcd", "redis"}]
READ_BY_ALL = {"GEARFALL_ETCD", "GEARFALL_REDIS", "GEARFALL_CLUSTER_SECRET", "GEARFALL_METRICS"}
"""What one block gives every service, whether or not it needs it."""


def with_defaults(text: str) -> str:
    """Replace `${NAME:-default}` by its default, as Compose does where NAME is unset."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


def environment_of(service: str) -> Mapping[str, str]:
    given = SERVICES[service]["environment"]
    return {name: with_defaults(str(value)) for name, value in given.items()}


def kind_of(service: str) -> str:
    command = SERVICES[service]["command"]
    assert command[:3] == ["python", "-m", f"services.{command[2].rpartition('.')[2]}"]
    return str(command[2].rpartition(".")[2])


@pytest.fixture(autouse=True)
def nothing_inherited(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("GEARFALL_"):
            monkeypatch.delenv(name)


@pytest.mark.parametrize("service", OURS)
def test_every_variable_arrives_at_its_service(
    service: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = environment_of(service)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    settings = vars(PARSERS[kind_of(service)]([]))
    for name, value in environment.items():
        if not name.startswith("GEARFALL_") or name in READ_BY_ALL:
            continue
        setting = settings[name.removeprefix("GEARFALL_").lower()]
        assert str(setting) == value or (setting == [] and not value), name


@pytest.mark.parametrize("service", OURS)
def test_the_address_that_others_are_told_is_its_own(service: str) -> None:
    environment = environment_of(service)
    host, _, port = environment["GEARFALL_ADVERTISE"].partition(":")
    assert host == service
    assert environment["GEARFALL_LISTEN"] == f"0.0.0.0:{port}"


def test_a_worker_shares_the_attach_socket_of_its_own_node() -> None:
    def attach_volume(service: str) -> str:
        mounts = dict(volume.split(":")[:2] for volume in SERVICES[service]["volumes"])
        return next(str(volume) for volume, at in mounts.items() if at == "/run/gearfall")

    nodes = {
        environment_of(s)["GEARFALL_NODE_ID"]: attach_volume(s) for s in ("store-1", "store-2")
    }
    assert len(set(nodes.values())) == len(nodes) == 2
    for worker in (name for name in OURS if kind_of(name) == "worker"):
        assert attach_volume(worker) == nodes[environment_of(worker)["GEARFALL_NODE_ID"]]


@pytest.mark.parametrize("service", SERVICES)
def test_every_container_is_watched_bounded_and_started_again(service: str) -> None:
    facts = SERVICES[service]
    for key in ("healthcheck", "mem_limit", "stop_grace_period"):
        assert key in facts, key
    assert facts["restart"] == "unless-stopped"
    assert facts["init"] is True


def test_only_the_router_is_published_and_only_to_this_machine() -> None:
    assert [name for name, facts in SERVICES.items() if "ports" in facts] == ["router"]
    published = [with_defaults(port) for port in SERVICES["router"]["ports"]]
    assert published == ["127.0.0.1:8080:8080", "127.0.0.1:50051:50051"]


def test_redis_appends_every_write_to_a_log() -> None:
    command = SERVICES["redis"]["command"]
    assert command[command.index("--appendonly") + 1] == "yes"
    assert any(volume.endswith(":/data") for volume in SERVICES["redis"]["volumes"])


def test_a_gpu_is_asked_for_in_its_profile_alone() -> None:
    profiled = {name: facts["profiles"] for name, facts in SERVICES.items() if "profiles" in facts}
    assert profiled == {"worker-gpu": ["gpu"]}
    gpu = SERVICES["worker-gpu"]
    (device,) = gpu["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]
    assert environment_of("worker-gpu")["GEARFALL_DEVICE"] == "cuda:0"


def test_every_variable_an_operator_may_set_is_described() -> None:
    text = (FOLDER / "compose.yml").read_text()
    offered = set(re.findall(r"\$\{(\w+)", text))
    described = set(re.findall(r"`(GEARFALL_\w+)`", (FOLDER / "README.md").read_text()))
    assert offered - described == set()


def test_the_image_runs_as_a_user_and_takes_its_base_as_an_argument() -> None:
    lines = (FOLDER / "Dockerfile").read_text().splitlines()
    assert "ARG BASE_IMAGE=python:3.11-slim" in lines
    run_stage = lines[lines.index("FROM ${BASE_IMAGE} AS run") :]
    assert [line for line in run_stage if line.startswith("USER")] == ["USER 10001:10001"]
