"""The Router gRPC door: converts, calls one service method, converts back."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import grpc

from gearfall.core.errors import InvalidRequest
from gearfall.core.ids import ModelName
from gearfall.infra.net.bearer import HEADER, tenant_of
from gearfall.infra.net.convert import deployment_from_pb, deployment_to_pb, model_to_pb
from gearfall.infra.net.grpc_channels import MAX_MESSAGE_BYTES
from gearfall.pb import common_pb2, router_pb2_grpc, scheduler_pb2, store_pb2
from gearfall.pb import router_pb2 as pb
from services.router.cluster.catalogue import Catalogue
from services.router.cluster.cluster_status import ClusterStatus
from services.router.cluster.peers import Peers
from services.router.doors.router_convert import (
    decision_to_pb,
    event_to_pb,
    explanation_to_pb,
    promise_to_pb,
    request_from_pb,
    start_to_pb,
)
from services.router.generation import GenerationRequest
from services.router.request_log import decisions_within
from services.router.service import RouterService

_FRAME_BYTES = 5
"""At most, of one event in an answer's message besides the event: its tag and its length."""
_TOO_LARGE = f"the answer is larger than {MAX_MESSAGE_BYTES >> 20} MiB: ask for it as a stream"

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

# Method names are gRPC's.
# ruff: noqa: ARG002, N802


class RouterServicer(router_pb2_grpc.RouterServicer):
    """Errors raised here are mapped by the server's interceptor."""

    def __init__(
        self,
        service: RouterService,
        catalogue: Catalogue,
        peers: Peers,
        status: ClusterStatus,
        api_keys: Sequence[str] = (),
    ) -> None:
        """`api_keys`: which the server's interceptor has checked already."""
        self._api_keys = tuple(api_keys)
        self._service = service
        self._catalogue = catalogue
        self._peers = peers
        self._status = status

    async def Generate(
        self, request: pb.GenerateRequest, context: Context
    ) -> AsyncIterator[pb.GenerateEvent]:
        """Stream one request's events; a client that goes away stops the work."""
        running = await self._service.start(self._asked(request, context))
        context.add_done_callback(lambda _: running.close())  # type: ignore[arg-type]
        yield start_to_pb(running)
        try:
            async for batch in running.batches():
                for event in batch:
                    yield event_to_pb(event)
        finally:
            running.close()

    async def Answer(self, request: pb.GenerateRequest, context: Context) -> pb.GenerateAnswer:
        """Return one request's events at its end; a client that goes away stops the work.

        So does an answer that no message holds.
        """
        running = await self._service.start(self._asked(request, context, is_whole=True))
        events = [start_to_pb(running)]
        size_bytes = _size_bytes(events)
        try:
            async for batch in running.batches():
                further = [event_to_pb(event) for event in batch]
                size_bytes += _size_bytes(further)
                if size_bytes > MAX_MESSAGE_BYTES:
                    error = InvalidRequest(_TOO_LARGE)
                    running.fail(error)
                    raise error
                events += further
        finally:
            running.close()
        return pb.GenerateAnswer(events=events)

    async def Cancel(self, request: pb.CancelRequest, context: Context) -> pb.CancelReply:
        """Stop a request by id."""
        self._service.cancel(request.request_id)
        return pb.CancelReply()

    async def ListModels(
        self, request: pb.ListModelsRequest, context: Context
    ) -> pb.ListModelsReply:
        """List models, cold ones included, and deployments."""
        view = self._catalogue.view
        models = [
            model_to_pb(
                record,
                self._readiness(record.name),
                self._service.expected_start_s(record.name),
            )
            for record in view.models.values()
        ]
        deployments = [deployment_to_pb(each) for each in view.deployments.values()]
        return pb.ListModelsReply(models=models, deployments=deployments)

    async def RegisterModel(
        self, request: store_pb2.RegisterModelRequest, context: Context
    ) -> AsyncIterator[store_pb2.RegisterProgress]:
        """Register with every live store and stream their progress."""
        async for progress in self._catalogue.register_model(
            request.name, request.path, request.base
        ):
            yield progress

    async def RemoveModel(
        self, request: pb.RemoveModelRequest, context: Context
    ) -> pb.RemoveModelReply:
        """Remove a model everywhere."""
        await self._catalogue.remove_model(request.name)
        return pb.RemoveModelReply()

    async def PutDeployment(
        self, request: pb.PutDeploymentRequest, context: Context
    ) -> pb.PutDeploymentReply:
        """Create or replace a deployment."""
        wanted = deployment_from_pb(request.deployment)
        plan = request.gear_plan
        record, revision = await self._catalogue.put_deployment(wanted, gear_plan=plan)
        return pb.PutDeploymentReply(deployment=deployment_to_pb(record, revision))

    async def RemoveDeployment(
        self, request: pb.RemoveDeploymentRequest, context: Context
    ) -> pb.RemoveDeploymentReply:
        """Remove a deployment."""
        await self._catalogue.remove_deployment(request.name)
        return pb.RemoveDeploymentReply()

    async def GetStatus(self, request: pb.GetStatusRequest, context: Context) -> pb.GetStatusReply:
        """Return the cluster as this router sees it."""
        return await self._status.read()

    async def Explain(
        self, request: scheduler_pb2.ExplainRequest, context: Context
    ) -> scheduler_pb2.ExplainReply:
        """Explain a request from the request log, a model by asking the leading scheduler.

        A deployment is explained by what its plan promised and what this router sees.
        """
        if request.WhichOneof("subject") == "model":
            if request.model in self._catalogue.view.deployments:
                told = self._service.desk.quality.explain(request.model)
                return scheduler_pb2.ExplainReply(
                    explanations=[promise_to_pb(request.model, *each) for each in told]
                )
            return await self._peers.explain_model(request.model)
        events = self._service.request_log.events(request.request_id)
        decisions = decisions_within(events, self._catalogue.view.decisions)
        found = [explanation_to_pb(request.request_id, each) for each in events]
        found += [decision_to_pb(each) for each in decisions]
        return scheduler_pb2.ExplainReply(
            explanations=sorted(found, key=lambda each: -each.at_unix_s)
        )

    def _asked(
        self, message: pb.GenerateRequest, context: Context, *, is_whole: bool = False
    ) -> GenerationRequest:
        asked = request_from_pb(message, is_whole=is_whole)
        if len(self._api_keys) < 2:
            return asked
        header = dict(context.invocation_metadata() or ()).get(HEADER, "")
        return replace(asked, tenant=tenant_of(str(header), self._api_keys, asked.tenant))

    def _readiness(self, model: ModelName) -> "common_pb2.ModelReadiness.ValueType":
        is_ready, is_starting = self._service.readiness(model)
        if is_ready:
            return common_pb2.MODEL_READINESS_READY
        if is_starting:
            return common_pb2.MODEL_READINESS_STARTING
        return common_pb2.MODEL_READINESS_COLD


def _size_bytes(events: Sequence[pb.GenerateEvent]) -> int:
    return sum(event.ByteSize() + _FRAME_BYTES for event in events)
