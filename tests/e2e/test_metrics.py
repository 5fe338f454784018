"""Every service of a running cluster is scraped over HTTP, and its numbers follow a request."""

import json

import httpx

from gearfall.cli.connection import run_dir
from gearfall.client import AsyncClient
from gearfall.demo import catalogue
from tests.cluster_host import ClusterHost
from tests.gearfall.infra.metric_samples import Samples, samples_of

NAME = "metered"


def scrape(host: ClusterHost, service: str) -> Samples:
    reply = httpx.get(f"http://{host.service(service).metrics}/metrics")
    assert reply.status_code == 200
    assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    return samples_of(reply.text)


async def test_a_request_shows_in_every_services_metrics(
    client: AsyncClient, host: ClusterHost
) -> None:
    path = str(catalogue.checkpoint_path("arith-small"))
    _ = [item async for item in client.register_model(NAME, path)]
    answer = await client.generate(NAME, "2+3=", temperature=0.0, max_tokens=8)
    assert answer.text == "5"

    router = scrape(host, "router")
    assert router["gearfall_requests_total", NAME, "finished"] == 1
    store = scrape(host, "store")
    assert store["gearfall_store_loads_total", "done", "ssd"] >= 1
    assert store["gearfall_store_load_seconds_count", "ssd"] >= 1
    assert (
        0
        < store["gearfall_store_used_bytes", "dram"]
        < store["gearfall_store_capacity_bytes", "dram"]
    )
    worker = scrape(host, "worker")
    assert worker["gearfall_worker_tokens_total", NAME] >= 1
    assert worker["gearfall_worker_starts_total", NAME, "ready"] == 1
    assert worker["gearfall_worker_start_seconds_count", NAME, "total"] == 1
    assert worker["gearfall_worker_kv_blocks", NAME, "capacity"] > 0
    assert worker["gearfall_worker_jobs_ended_total", "stop", NAME] == 1
    scheduler = scrape(host, "scheduler")
    assert scheduler["gearfall_scheduler_leader",] == 1
    assert scheduler["gearfall_scheduler_decisions_total", "start"] >= 1
    assert scheduler["gearfall_scheduler_start_seconds_count", NAME] == 1


def test_prometheus_finds_every_service_in_a_file(host: ClusterHost) -> None:
    entries = json.loads((run_dir(host.home) / "prometheus.json").read_bytes())
    jobs = {entry["labels"]["job"] for entry in entries}
    assert jobs == {f"gearfall-{name}" for name in ("store", "worker", "scheduler", "router")}
    for entry in entries:
        (address,) = entry["targets"]
        assert httpx.get(f"http://{address}/metrics").status_code == 200
