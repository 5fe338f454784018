"""Which flags make TLS towards etcd, and which don't fit."""

import shutil
import subprocess
from pathlib import Path

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


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """a.pem with a.key, b.pem with b.key, locked.key: a's with a password, and no.pem."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl is not here to make certificates")
    made = tmp_path_factory.mktemp("keys")
    new = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2"
    for command in (
        f"{new} -subj /CN=a -keyout a.key -out a.pem",
        f"{new} -subj /CN=b -keyout b.key -out b.pem",
        "pkey -in a.key -aes128 -passout pass:secret -out locked.key",
    ):
        subprocess.run([openssl, *command.split()], cwd=made, check=True, capture_output=True)
    (made / "no.pem").write_text("garbage")
    return made


def test_files_become_what_they_hold(keys: Path) -> None:
    files = {"ca": "b.pem", "cert": "a.pem", "key": "a.key"}
    read = read_tls("https://a", **{flag: str(keys / file) for flag, file in files.items()})
    ca, cert, key = ((keys / file).read_bytes() for file in files.values())
    assert read == EtcdTls(ca, cert, key)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"ca": "no.pem"}, "--etcd-ca .*no.pem: no certificate"),
        ({"cert": "a.pem", "key": "b.key"}, "--etcd-cert .*a.pem and --etcd-key .*b.key are no"),
        ({"cert": "no.pem", "key": "a.key"}, "no certificate and its key"),
        ({"cert": "a.pem", "key": "no.pem"}, "no certificate and its key"),
        ({"cert": "a.pem", "key": "locked.key"}, "no certificate and its key"),
    ],
)
def test_files_that_do_not_fit_each_other_are_refused(
    keys: Path, files: dict[str, str], words: str
) -> None:
    with pytest.raises(InvalidRequest, match=words):
        read_tls("https://a", **{flag: str(keys / file) for flag, file in files.items()})


def test_files_are_wanted_where_endpoints_are_https_only() -> None:
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
