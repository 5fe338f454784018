"""Cluster state in an etcd that speaks TLS only and asks who comes."""

import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from gearfall.core.errors import Unavailable
from gearfall.infra.local.local_servers import LocalServer, _is_etcd_ready, etcd_spec, free_ports
from gearfall.infra.state.etcd_state import EtcdState
from gearfall.infra.state.etcd_tls import read_tls
from tests.cluster_host import ClusterHost

OPENSSL = shutil.which("openssl")
pytestmark = pytest.mark.skipif(OPENSSL is None, reason="openssl is not here to make certificates")


@dataclass(frozen=True, slots=True)
class Site:
    """The server and the files that open it."""

    url: str
    files: dict[str, str]
    """ca, cert, key."""


def sign(directory: Path, name: str, *extensions: str) -> None:
    """Make NAME.key and NAME.pem, signed by ca, or by itself where `name` is ca."""
    by = ("-CA", "ca.pem", "-CAkey", "ca.key") if name != "ca" else ()
    argv = [
        *(str(OPENSSL), "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
        *("-nodes", "-subj", f"/CN={name}", "-days", "2"),
        *("-keyout", f"{name}.key", "-out", f"{name}.pem", *by),
        *(part for extension in extensions for part in ("-addext", extension)),
    ]
    subprocess.run(argv, cwd=directory, check=True, capture_output=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    keys = tmp_path_factory.mktemp("keys")
    sign(keys, "ca")
    sign(keys, "server", "subjectAltName=IP:127.0.0.1,DNS:etcd.internal")
    sign(keys, "client", "extendedKeyUsage=clientAuth")
    spec = etcd_spec(tmp_path_factory.mktemp("etcd"), is_durable=False)
    url = spec.url.replace("http://", "https://")
    # Whether it serves is asked on a port of its own, which needs no certificate.
    (health_port,) = free_ports(1)
    argv = [url if part == spec.url else part for part in spec.argv]
    argv += ["--listen-metrics-urls", f"http://127.0.0.1:{health_port}", "--client-cert-auth"]
    argv += ["--trusted-ca-file", str(keys / "ca.pem")]
    argv += ["--cert-file", str(keys / "server.pem"), "--key-file", str(keys / "server.key")]
    server = LocalServer(
        replace(spec, argv=argv, url=url, is_ready=lambda: _is_etcd_ready(health_port))
    )
    server.start()
    files = {"ca": "ca.pem", "cert": "client.pem", "key": "client.key"}
    yield Site(url, {flag: str(keys / file) for flag, file in files.items()})
    server.stop()


async def test_state_is_read_and_written_by_who_shows_a_certificate(site: Site) -> None:
    for endpoints in (site.url, f"{site.url},{site.url}"):
        state = EtcdState(endpoints, prefix="/tls/", tls=read_tls(endpoints, **site.files))
        await state.put("key", endpoints.encode())
        entry = await state.get("key")
        assert entry is not None
        assert entry.value == endpoints.encode()
        await state.close()


async def test_a_server_may_be_named_otherwise_than_its_endpoint(site: Site) -> None:
    for name, is_right in (("etcd.internal", True), ("etcd.elsewhere", False)):
        tls = read_tls(site.url, **site.files, server_name=name)
        state = EtcdState(site.url, prefix="/named/", tls=tls, timeout_s=5.0 if is_right else 0.3)
        if is_right:
            await state.put("key", b"")
        else:
            with pytest.raises(Unavailable):
                await state.put("key", b"")
        await state.close()


async def test_where_one_member_is_gone_another_with_the_same_name_answers(site: Site) -> None:
    (free_port,) = free_ports(1)
    endpoints = f"https://127.0.0.2:{free_port},{site.url}"
    tls = read_tls(endpoints, **site.files, server_name="etcd.internal")
    state = EtcdState(endpoints, prefix="/members/", tls=tls)
    await state.put("key", b"")
    await state.close()


@pytest.mark.parametrize("shown", [{}, {"ca"}], ids=["believes nobody", "shows nothing"])
async def test_nobody_else_gets_in(site: Site, shown: set[str]) -> None:
    files = {flag: file for flag, file in site.files.items() if flag in shown}
    state = EtcdState(site.url, tls=read_tls(site.url, **files), timeout_s=0.3)
    with pytest.raises(Unavailable):
        await state.put("key", b"")
    await state.close()


async def test_without_tls_nothing_is_said(site: Site) -> None:
    state = EtcdState(site.url.replace("https://", "http://"), timeout_s=0.3)
    with pytest.raises(Unavailable):
        await state.put("key", b"")
    await state.close()


def test_every_service_takes_the_files_from_its_flags(site: Site, tmp_path: Path) -> None:
    environment = {f"GEARFALL_ETCD_{flag.upper()}": file for flag, file in site.files.items()}
    host = ClusterHost(tmp_path / "home", "--etcd", site.url, environment=environment)
    assert {facts.service for facts in host.facts.services if facts.state == "ready"} >= {
        *("store", "worker", "scheduler", "router")
    }
    assert host.stop() == 0
