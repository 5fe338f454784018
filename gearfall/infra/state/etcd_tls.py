"""TLS towards etcd: what flags name, read and held against the endpoints' scheme."""

import ssl
from dataclasses import dataclass
from pathlib import Path

from gearfall.core.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class EtcdTls:
    """All in PEM."""

    ca_pem: bytes | None = None
    """Who may have signed the server's certificate; None: the authorities that gRPC knows."""
    cert_pem: bytes | None = None
    """Of this client, where etcd asks for one."""
    key_pem: bytes | None = None
    server_name: str = ""
    """Name to expect in the servers' certificates; empty: their host's, where they have one."""


def uses_tls(endpoints: str) -> bool:
    """Whether endpoints, URLs by commas, are https; InvalidRequest when only some of them are."""
    found = {each.strip().startswith("https://") for each in endpoints.split(",") if each.strip()}
    if len(found) > 1:
        raise InvalidRequest("etcd's endpoints are https, all of them, or none is", param="etcd")
    return found == {True}


def read_tls(
    endpoints: str, *, ca: str = "", cert: str = "", key: str = "", server_name: str = ""
) -> EtcdTls | None:
    """Return how endpoints are spoken with, None without TLS; `ca`, `cert`, `key`: PEM files.

    Raises InvalidRequest for files that can't be read or don't fit the endpoints or each other.
    """
    if not uses_tls(endpoints):
        if ca or cert or key or server_name:
            raise InvalidRequest("TLS towards etcd wants https endpoints", param="etcd")
        return None
    if bool(cert) != bool(key):
        raise InvalidRequest("a client's certificate wants its key, and the other way round")
    tls = EtcdTls(
        _read(ca, "etcd-ca"), _read(cert, "etcd-cert"), _read(key, "etcd-key"), server_name
    )
    _check(ca, cert, key)
    return tls


def _check(ca: str, cert: str, key: str) -> None:
    """Raise InvalidRequest for what TLS can't be spoken with: gRPC would only never connect."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if ca:
        try:
            context.load_verify_locations(Path(ca).expanduser())
        except ssl.SSLError as error:
            raise InvalidRequest(f"--etcd-ca {ca}: no certificate", param="etcd-ca") from error
    if not cert:
        return
    try:
        # gRPC can't open a key that has a password: none is asked for.
        context.load_cert_chain(Path(cert).expanduser(), Path(key).expanduser(), lambda: "")
    except ssl.SSLError as error:
        raise InvalidRequest(
            f"--etcd-cert {cert} and --etcd-key {key} are no certificate and its key",
            param="etcd-cert",
        ) from error


def _read(path: str, param: str) -> bytes | None:
    if not path:
        return None
    try:
        return Path(path).expanduser().read_bytes()
    except OSError as error:
        raise InvalidRequest(f"--{param} {path}: {error.strerror}", param=param) from error
