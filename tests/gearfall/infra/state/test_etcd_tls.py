"""Which flags make TLS towards etcd, and which don't fit."""

import pytest

from gearfall.core.errors import InvalidRequest
from gearfall.infra.state.etcd_tls import EtcdTls, read_tls, uses_tls


@pytest.mark.parametrize(
    ("endpoints", "expected"),
    [
        ("http://a:1", False),
        ("a:1", False),
        ("https://a", True),
        ("https://a:1, https://b:2 ,", True),
    ],
)
def test_the_scheme_says_whether_it_is_tls(endpoints, expected):
    assert uses_tls(endpoints) is expected


def test_files_become_what_they_hold(tmp_path):
    for name in ("ca", "cert", "key"):
        (tmp_path / name).write_text(name)
    files = {name: str(tmp_path / name) for name in ("ca", "cert", "key")}
    assert read_tls("https://a", **files) == EtcdTls(b"ca", b"cert", b"key")
    assert read_tls("https://a", server_name="etcd") == EtcdTls(server_name="etcd")
    assert read_tls("http://a") is None


@pytest.mark.parametrize(
    ("endpoints", "flags", "words"),
    [
        ("https://a,http://b", {}, "all of them, or none"),
        ("http://a", {"ca": "/dev/null"}, "https endpoints"),
        ("http://a", {"server_name": "etcd"}, "https endpoints"),
        ("https://a", {"cert": "/dev/null"}, "wants its key"),
        ("https://a", {"key": "/dev/null"}, "wants its key"),
        ("https://a", {"ca": "/nowhere/ca.pem"}, "--etcd-ca /nowhere/ca.pem: No such file"),
    ],
)
def test_what_does_not_fit_is_refused(endpoints, flags, words):
    with pytest.raises(InvalidRequest, match=words):
        read_tls(endpoints, **flags)
