"""The pure parts of the etcd adapter: targets, key ranges, errors."""

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gearfall.core.errors import (
    Conflict,
    Internal,
    InvalidRequest,
    PermissionDenied,
    Unavailable,
)
from gearfall.infra.state.etcd_rpc import (
    channel_target,
    error_from_etcd,
    invoke,
    open_etcd_channel,
    prefix_end,
)
from gearfall.infra.state.etcd_tls import EtcdTls


@pytest.mark.parametrize(
    ("endpoints", "target"),
    [
        ("http://127.0.0.1:2379", "127.0.0.1:2379"),
        ("https://etcd.internal", "etcd.internal:2379"),
        ("etcd:4001", "etcd:4001"),
        ("http://[::1]:2379", "[::1]:2379"),
        ("http://10.0.0.1:1, http://10.0.0.2:2 ,", "ipv4:10.0.0.1:1,10.0.0.2:2"),
    ],
)
def test_endpoints_become_one_target(endpoints, target):
    assert channel_target(endpoints) == target


@pytest.mark.parametrize("endpoints", ["", " , ", "http://"])
def test_endpoints_that_name_nothing_are_refused(endpoints):
    with pytest.raises(Unavailable):
        channel_target(endpoints)


@pytest.mark.parametrize("tls", [None, EtcdTls()], ids=["no settings", "no name"])
def test_several_hosts_by_tls_want_a_name_that_all_bear(tls):
    with pytest.raises(InvalidRequest, match="--etcd-server-name"):
        open_etcd_channel("https://10.0.0.1:2379,https://10.0.0.2:2379", tls)


@pytest.mark.parametrize(
    ("endpoints", "name"),
    [
        ("https://10.0.0.1:2379,https://10.0.0.2:2379", "etcd.internal"),
        ("https://10.0.0.1:2379,https://10.0.0.1:2479", ""),
        ("https://10.0.0.1:2379,", ""),
    ],
)
async def test_hosts_with_one_name_are_one_channel(endpoints, name):
    await open_etcd_channel(endpoints, EtcdTls(server_name=name)).close()


@given(prefix=st.binary(max_size=4), key=st.binary(max_size=6))
def test_a_range_holds_exactly_the_keys_with_the_prefix(prefix, key):
    end = prefix_end(prefix)
    is_inside = key >= prefix and (end == b"\0" or key < end)
    assert is_inside == key.startswith(prefix)


def rpc_error(code: grpc.StatusCode) -> grpc.aio.AioRpcError:
    empty = grpc.aio.Metadata()
    return grpc.aio.AioRpcError(code, empty, empty, details="why")


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (grpc.StatusCode.UNAVAILABLE, Unavailable),
        (grpc.StatusCode.DEADLINE_EXCEEDED, Unavailable),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, Unavailable),
        (grpc.StatusCode.NOT_FOUND, Conflict),
        (grpc.StatusCode.PERMISSION_DENIED, PermissionDenied),
        (grpc.StatusCode.INVALID_ARGUMENT, Internal),
    ],
)
def test_errors_of_etcd_have_a_place_in_our_tree(code, error):
    mapped = error_from_etcd(rpc_error(code))
    assert type(mapped) is error
    assert "why" in mapped.message


@pytest.mark.parametrize(("attempts", "failures", "calls"), [(1, 1, 1), (2, 1, 2), (2, 2, 2)])
async def test_only_as_many_attempts_are_made_as_allowed(attempts, failures, calls):
    made = 0

    async def method(request: str, **deadline: float) -> str:
        nonlocal made
        assert deadline["timeout"] == 1.0
        made += 1
        if made <= failures:
            raise rpc_error(grpc.StatusCode.UNAVAILABLE)
        return request

    if failures < attempts:
        assert await invoke(method, "x", timeout_s=1.0, attempts=attempts) == "x"
    else:
        with pytest.raises(Unavailable):
            await invoke(method, "x", timeout_s=1.0, attempts=attempts)
    assert made == calls


async def test_what_is_no_outage_is_not_tried_again():
    made = 0

    async def method(request: str, **deadline: float) -> str:
        nonlocal made
        assert deadline["timeout"] == 1.0
        made += 1
        raise rpc_error(grpc.StatusCode.INVALID_ARGUMENT)

    with pytest.raises(Internal):
        await invoke(method, "x", timeout_s=1.0, attempts=3)
    assert made == 1
