"""An etcd whose quota is used up: reads and renewals go on, writes say why they don't."""

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from aetcd.rpc import rpc_pb2_grpc

from gearfall.core.errors import Conflict, Unavailable
from gearfall.infra.local.local_servers import LocalServer, etcd_spec
from gearfall.infra.state.etcd_rpc import invoke, prefix_end, rpc
from gearfall.infra.state.etcd_state import DEFAULT_PREFIX, EtcdState

QUOTA_BYTES = 8 * 2**20
FILLER = b"x" * 1_000_000


@pytest.fixture
async def state(tmp_path: Path) -> AsyncIterator[EtcdState]:
    spec = etcd_spec(tmp_path / "etcd", is_durable=False)
    argv = list(spec.argv)
    argv[argv.index("--quota-backend-bytes") + 1] = str(QUOTA_BYTES)
    server = LocalServer(replace(spec, argv=argv))
    server.start()
    opened = EtcdState(server.url, timeout_s=10.0)
    yield opened
    await opened.close()
    server.stop()


async def test_a_full_etcd_refuses_writes_with_its_reason_and_takes_them_again(state: EtcdState):
    lease = await state.grant_lease(60.0)
    await state.put("kept", b"1", lease=lease)
    with pytest.raises(Unavailable, match="space exceeded"):
        await fill(state)
    # What a router asks to tell whether writes are taken: it comes about under no circumstances.
    with pytest.raises(Unavailable, match="space exceeded"):
        await state.compare_and_set("probe", b"", expected_mod_revision=2**62)
    kept = await state.get("kept")
    assert kept is not None
    assert not lease.is_lost

    await make_room(state)
    with pytest.raises(Conflict):
        await state.compare_and_set("probe", b"", expected_mod_revision=2**62)
    await state.put("kept", b"2", lease=lease)


async def fill(state: EtcdState) -> None:
    """Write until it is refused; what counts for the quota is behind by some writes."""
    for number in range(8 * QUOTA_BYTES // len(FILLER)):
        await state.put(f"filler/{number}", FILLER)


async def make_room(state: EtcdState) -> None:
    """Do what an operator does: delete, compact, defragment, disarm."""
    maintenance = rpc_pb2_grpc.MaintenanceStub(state._stubs.channel)
    prefix = f"{DEFAULT_PREFIX}filler/".encode()
    # Not by a transaction: some etcds refuse those with the writes.
    filler = rpc.DeleteRangeRequest(key=prefix, range_end=prefix_end(prefix))
    await invoke(state._stubs.kv.DeleteRange, filler, timeout_s=10.0)
    revision = (await state.list("filler/")).revision
    compaction = rpc.CompactionRequest(revision=revision, physical=True)
    await invoke(state._stubs.kv.Compact, compaction, timeout_s=10.0)
    await invoke(maintenance.Defragment, rpc.DefragmentRequest(), timeout_s=10.0)
    alarms = await invoke(
        maintenance.Alarm, rpc.AlarmRequest(action=rpc.AlarmRequest.GET), timeout_s=10.0
    )
    for each in alarms.alarms:
        disarm = rpc.AlarmRequest(
            action=rpc.AlarmRequest.DEACTIVATE, memberID=each.memberID, alarm=each.alarm
        )
        await invoke(maintenance.Alarm, disarm, timeout_s=10.0)
