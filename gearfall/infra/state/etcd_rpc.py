"""etcd's gRPC stubs (from aetcd), the channel to several endpoints, and its errors in our tree."""

import asyncio
import contextlib
import ipaddress
import json
import socket
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import grpc
from aetcd.rpc import kv_pb2, rpc_pb2, rpc_pb2_grpc

from gearfall.core.errors import (
    Conflict,
    GearfallError,
    Internal,
    InvalidRequest,
    PermissionDenied,
    Unavailable,
)
from gearfall.infra.state.etcd_tls import EtcdTls, uses_tls

kv: Any = kv_pb2
rpc: Any = rpc_pb2

_SERVICE_CONFIG = json.dumps({"loadBalancingConfig": [{"round_robin": {}}]})
_OPTIONS = (
    ("grpc.service_config", _SERVICE_CONFIG),
    ("grpc.service_config_disable_resolution", 1),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
    ("grpc.max_receive_message_length", 256 * 1024 * 1024),
    ("grpc.max_send_message_length", 64 * 1024 * 1024),
    # etcd closes connections that are pinged more often than every 5 s.
    ("grpc.keepalive_time_ms", 6_000),
    ("grpc.keepalive_timeout_ms", 1_000),
    ("grpc.http2.ping_timeout_ms", 1_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 500),
)

_UNREACHABLE = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.UNKNOWN,
}
_REFUSED = {grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED}


class EtcdStubs:
    """One channel to an etcd cluster and the three services that gearfall calls on it."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.channel = channel
        self.kv: Any = rpc_pb2_grpc.KVStub(channel)
        self.lease: Any = rpc_pb2_grpc.LeaseStub(channel)
        self.watch: Any = rpc_pb2_grpc.WatchStub(channel)


def open_etcd_channel(endpoints: str, tls: EtcdTls | None = None) -> grpc.aio.Channel:
    """Return a channel that spreads calls over the live ones of `endpoints` (URLs by commas).

    Connects lazily; by TLS where they are https. Raises InvalidRequest when only some are, or when
    several hosts' certificates have no name in common; Unavailable when a host name among several
    can't be resolved.
    """
    target = channel_target(endpoints)
    if not uses_tls(endpoints):
        return grpc.aio.insecure_channel(target, options=_OPTIONS)
    tls = tls or EtcdTls()
    # Several endpoints are one target, whose servers are all held against one name.
    names = {host for host, _ in _hosts_and_ports(endpoints)}
    if len(names) > 1 and not tls.server_name:
        raise InvalidRequest(
            "several https endpoints want --etcd-server-name: a name in all their certificates",
            param="etcd-server-name",
        )
    name = tls.server_name or names.pop()
    credentials = grpc.ssl_channel_credentials(tls.ca_pem, tls.key_pem, tls.cert_pem)
    options = (*_OPTIONS, ("grpc.ssl_target_name_override", name))
    return grpc.aio.secure_channel(target, credentials, options=options)


def channel_target(endpoints: str) -> str:
    """Return gRPC's target for `http://a:2379,http://b:2379`; one endpoint keeps its name."""
    hosts = _hosts_and_ports(endpoints)
    if not hosts:
        raise Unavailable("no etcd endpoint is configured")
    if len(hosts) == 1:
        host, port = hosts[0]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    return "ipv4:" + ",".join(f"{_ipv4_of(host)}:{port}" for host, port in hosts)


def error_from_etcd(error: grpc.aio.AioRpcError) -> GearfallError:
    """Return the error of our tree for one of etcd's."""
    text = f"etcd: {error.details() or error.code().name}"
    if error.code() == grpc.StatusCode.NOT_FOUND:  # only a lease can be missing
        return Conflict(text)
    if error.code() in _UNREACHABLE:
        return Unavailable(text, retry_after_s=1.0)
    return PermissionDenied(text) if error.code() in _REFUSED else Internal(text)


@contextlib.contextmanager
def etcd_errors() -> Iterator[None]:
    """Translate etcd's errors, and the way grpc.aio reports a channel closed under a call."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise error_from_etcd(error) from error
    except grpc.aio.UsageError as error:
        raise Unavailable("the connection to etcd is closed") from error
    except asyncio.InvalidStateError as error:  # a write on a stream that ended while it was idle
        raise Unavailable("etcd ended the stream before the call") from error
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise Unavailable("the connection to etcd was closed during the call") from error


async def invoke(method: Any, request: Any, *, timeout_s: float, attempts: int = 1) -> Any:
    """Call a unary method with a deadline for each attempt; several for idempotent calls only."""
    for attempt in range(attempts, 0, -1):
        try:
            with etcd_errors():
                return await method(request, timeout=timeout_s, wait_for_ready=True)
        except Unavailable:
            if attempt == 1:
                raise
    raise AssertionError("attempts must be at least 1")


def prefix_end(prefix: bytes) -> bytes:
    """Return the first key after all that start with `prefix` (etcd's range_end)."""
    stem = prefix.rstrip(b"\xff")
    return stem[:-1] + bytes((stem[-1] + 1,)) if stem else b"\0"


def _hosts_and_ports(endpoints: str) -> list[tuple[str, int]]:
    return [_host_port(endpoint) for endpoint in endpoints.split(",") if endpoint.strip()]


def _host_port(endpoint: str) -> tuple[str, int]:
    text = endpoint.strip()
    parts = urlsplit(text if "//" in text else f"//{text}")
    if not parts.hostname:
        raise Unavailable(f"{endpoint!r} is no etcd endpoint: write http://host:port")
    return parts.hostname, parts.port or 2379


def _ipv4_of(host: str) -> str:
    try:
        return str(ipaddress.IPv4Address(host))
    except ValueError:
        pass
    try:
        return socket.gethostbyname(host)
    except OSError as error:
        raise Unavailable(f"the etcd host {host} can't be resolved: {error}") from error
