"""`gearfall up --etcd URL --redis URL` uses the servers it is given and leaves them running."""

from pathlib import Path

from gearfall.client import Client
from gearfall.demo import catalogue
from gearfall.infra.local.local_servers import start_etcd, start_redis
from tests.cluster_host import ClusterHost


def test_a_cluster_on_servers_of_the_users_own(tmp_path: Path) -> None:
    etcd, redis = start_etcd(tmp_path / "etcd"), start_redis(tmp_path / "redis")
    try:
        for _ in range(2):
            host = ClusterHost(tmp_path / "home", "--etcd", etcd.url, "--redis", redis.url)
            services = {facts.service for facts in host.facts.services}
            assert services == {"store", "worker", "scheduler", "router"}
            with Client(host.addresses["grpc"]) as client:
                path = str(catalogue.checkpoint_path("arith-small"))
                list(client.register_model("kept", path))
                assert client.generate("kept", "2+3=", temperature=0.0).text == "5"
            assert host.stop() == 0
    finally:
        etcd.stop()
        redis.stop()
