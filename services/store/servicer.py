"""The Store service over gRPC: converts, calls one method of the service, converts back."""

from collections.abc import AsyncIterator

from gearfall.core.ids import ModelName
from gearfall.core.tiers import Tier
from gearfall.infra.net.convert import TIER_FROM_PB, TIER_TO_PB, model_to_pb, timeline_to_pb
from gearfall.infra.net.grpc_errors import Context
from gearfall.pb import common_pb2, store_pb2, store_pb2_grpc
from services.store.service import StoreService


class StoreServicer(store_pb2_grpc.StoreServicer):
    """Adapter between the Store proto and a StoreService."""

    def __init__(self, service: StoreService) -> None:
        self._service = service

    async def RegisterModel(  # noqa: N802 - named by the proto
        self, request: store_pb2.RegisterModelRequest, _context: Context
    ) -> AsyncIterator[store_pb2.RegisterProgress]:
        """Stream the registration's progress; the last message carries the model."""
        flight = self._service.register(request.name, request.path, request.base)
        message = store_pb2.RegisterProgress(
            name=request.name, node_id=self._service.settings.node_id
        )
        async for progress in flight.follow():
            message.phase = progress.phase
            message.done_bytes, message.total_bytes = progress.done_bytes, progress.total_bytes
            if progress.phase != "done":
                yield message
        message.model.CopyFrom(model_to_pb(await flight.wait()))
        yield message

    async def LoadModel(  # noqa: N802 - named by the proto
        self, request: store_pb2.LoadModelRequest, _context: Context
    ) -> AsyncIterator[store_pb2.LoadProgress]:
        """Stream the load's progress; the last message says where to take the lease."""
        target = TIER_FROM_PB.get(request.target, Tier.DRAM)
        flight = self._service.load(
            request.model, request.priority, target, wanted_unix_s=request.wanted_unix_s
        )
        socket = str(self._service.attach.path)
        async for progress in flight.follow():
            filling = self._service.loader.filling_of(ModelName(request.model))
            yield store_pb2.LoadProgress(
                tier=TIER_TO_PB[progress.tier],
                done_bytes=progress.done_bytes,
                total_bytes=progress.total_bytes,
                attach_socket=socket if filling else "",
                digest=filling.digest if filling else "",
            )
        loaded = await flight.wait()
        yield store_pb2.LoadProgress(
            tier=TIER_TO_PB[loaded.tier],
            done_bytes=loaded.size_bytes,
            total_bytes=loaded.size_bytes,
            done=True,
            attach_socket=socket,
            digest=loaded.digest,
            timeline=timeline_to_pb(loaded.timeline),
        )

    async def UnloadModel(  # noqa: N802 - named by the proto
        self, request: store_pb2.UnloadModelRequest, _context: Context
    ) -> store_pb2.UnloadModelReply:
        """Drop a model from the pool."""
        return store_pb2.UnloadModelReply(freed_bytes=self._service.unload(request.model))

    async def DeleteModel(  # noqa: N802 - named by the proto
        self, request: store_pb2.DeleteModelRequest, _context: Context
    ) -> store_pb2.DeleteModelReply:
        """Remove a model from this node."""
        await self._service.delete(request.model)
        return store_pb2.DeleteModelReply()

    async def ReadFile(  # noqa: N802 - named by the proto
        self, request: store_pb2.ReadFileRequest, _context: Context
    ) -> store_pb2.ReadFileReply:
        """Return a small file of a checkpoint."""
        content = await self._service.read_file(request.model, request.file)
        return store_pb2.ReadFileReply(content=content)

    async def ReadCanary(  # noqa: N802 - named by the proto
        self, request: store_pb2.ReadCanaryRequest, _context: Context
    ) -> store_pb2.ReadCanaryReply:
        """Return a model's canary."""
        return store_pb2.ReadCanaryReply(content=await self._service.read_canary(request.model))

    async def OpenTransfer(  # noqa: N802 - named by the proto
        self, request: store_pb2.OpenTransferRequest, _context: Context
    ) -> store_pb2.OpenTransferReply:
        """Open bulk connections for a neighbour."""
        manifest, tokens = self._service.open_transfer(
            request.model, request.digest, request.connections
        )
        return store_pb2.OpenTransferReply(
            manifest=manifest, port=self._service.transfers.port, tokens=tokens
        )

    async def GetStatus(  # noqa: N802 - named by the proto
        self, _request: store_pb2.StoreStatusRequest, _context: Context
    ) -> store_pb2.StoreStatus:
        """Say what is where on this node."""
        service = self._service
        return store_pb2.StoreStatus(
            node_id=service.settings.node_id,
            address=service.address,
            residency=[*_on_ssd(service), *_in_dram(service)],
            tiers=_tiers(service),
        )


def _on_ssd(service: StoreService) -> list[common_pb2.Residency]:
    return [
        common_pb2.Residency(
            model=model.name,
            tier=TIER_TO_PB[Tier.SSD],
            resident_bytes=model.manifest.size_bytes,
            total_bytes=model.manifest.size_bytes,
        )
        for model in list(service.ssd.models.values())
    ]


def _in_dram(service: StoreService) -> list[common_pb2.Residency]:
    return [
        common_pb2.Residency(
            model=resident.model,
            tier=TIER_TO_PB[Tier.DRAM],
            resident_bytes=resident.size_bytes,
            total_bytes=resident.size_bytes,
            leases=len(service.pool.holders(resident.model)),
        )
        for resident in service.pool.residents
    ]


def _tiers(service: StoreService) -> list[common_pb2.TierBandwidth]:
    loader, room, pool = service.loader, service.room, service.pool
    return [
        common_pb2.TierBandwidth(
            tier=TIER_TO_PB[Tier.REMOTE],
            bytes_per_s=loader.bandwidth_of(Tier.REMOTE),
            queued_bytes=loader.queued_bytes_of(is_far=True),
        ),
        common_pb2.TierBandwidth(
            tier=TIER_TO_PB[Tier.SSD],
            bytes_per_s=loader.bandwidth_of(Tier.SSD),
            capacity_bytes=room.capacity_bytes,
            used_bytes=room.used_bytes,
            queued_bytes=loader.queued_bytes_of(is_far=False),
        ),
        common_pb2.TierBandwidth(
            tier=TIER_TO_PB[Tier.DRAM],
            capacity_bytes=pool.capacity_bytes,
            used_bytes=pool.used_bytes,
        ),
    ]
