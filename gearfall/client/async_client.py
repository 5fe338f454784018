"""The asyncio client over the router's gRPC door."""

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Self, TypeVar, Unpack

import grpc

from gearfall.client.request import GenerateCall, Options, Prompt
from gearfall.client.values import Answer, Event, answer_from_events, event_from_pb
from gearfall.core.deployment import check_deployment_shape
from gearfall.core.records import DeploymentRecord
from gearfall.infra.net.bearer import bearer_metadata
from gearfall.infra.net.convert import deployment_from_pb, deployment_to_pb
from gearfall.infra.net.grpc_channels import open_channel
from gearfall.infra.net.grpc_errors import error_from_rpc
from gearfall.pb import router_pb2, router_pb2_grpc, scheduler_pb2, store_pb2

DEFAULT_ADDRESS = "127.0.0.1:50051"
_ADMIN_TIMEOUT_S = 30.0
_REGISTER_TIMEOUT_S = 3600.0
_GENERATE_TIMEOUT_S = 3600.0

T = TypeVar("T")


class AsyncClient:
    """Speaks to one router. Every method raises an error of the gearfall tree.

    async with AsyncClient("127.0.0.1:50051") as client:
        answer = await client.generate("arith", "12+30=")
    """

    def __init__(self, address: str = DEFAULT_ADDRESS, *, api_key: str = "") -> None:
        """`address`: host:port of the router's gRPC server. Connects on the first call.

        `api_key`: sent with every call; a router that has keys raises Unauthenticated without one.
        """
        self.address = address
        self._metadata = bearer_metadata(api_key)
        self._channel = open_channel(address)
        self._router = router_pb2_grpc.RouterStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the channel; running calls are cancelled."""
        await self._channel.close()

    async def generate(self, model: str, prompt: Prompt, **options: Unpack[Options]) -> Answer:
        """Return the whole answer of a model or deployment.

        `prompt` is text, token ids or chat messages. Cancelling the task stops the work. Raises
        InvalidRequest for an answer above 64 MiB, logprobs included: `stream` returns one.
        """
        request = GenerateCall(model, prompt, options).to_pb()
        call = self._router.Answer(request, timeout=_GENERATE_TIMEOUT_S, metadata=self._metadata)
        try:
            reply = await call
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error) from error
        return answer_from_events(map(event_from_pb, reply.events))

    async def stream(
        self, model: str, prompt: Prompt, **options: Unpack[Options]
    ) -> AsyncIterator[Event]:
        """Yield Started, then Waiting and TextDelta as they come, then one Finished per choice.

        With stream mode `draft` a Replaced makes the text of its choice void that came before it.

        Closing the iterator stops the work within one decode step.
        """
        request = GenerateCall(model, prompt, options).to_pb()
        async with contextlib.aclosing(self._events(request)) as events:
            async for event in events:
                yield event

    async def _events(self, request: router_pb2.GenerateRequest) -> AsyncGenerator[Event, None]:
        call = self._router.Generate(request, timeout=_GENERATE_TIMEOUT_S, metadata=self._metadata)
        try:
            async for message in call:
                yield event_from_pb(message)
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error) from error
        finally:
            call.cancel()

    async def cancel(self, request_id: str) -> None:
        """Stop a running request. Raises NotFound when it is not running."""
        await self._call(self._router.Cancel, router_pb2.CancelRequest(request_id=request_id))

    async def models(self) -> router_pb2.ListModelsReply:
        """Return registered models (with readiness) and deployments."""
        return await self._call(self._router.ListModels, router_pb2.ListModelsRequest())

    async def register_model(
        self, name: str, path: str, *, base: str = ""
    ) -> AsyncIterator[store_pb2.RegisterProgress]:
        """Register a Hugging Face directory with every live store; yield progress per node.

        `path` is a directory on the stores' machines. `base` names the registered model that a
        LoRA adapter belongs to, where its adapter_config.json does not.
        """
        request = store_pb2.RegisterModelRequest(name=name, path=path, base=base)
        call = self._router.RegisterModel(
            request, timeout=_REGISTER_TIMEOUT_S, metadata=self._metadata
        )
        try:
            async for progress in call:
                yield progress
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error) from error
        finally:
            call.cancel()

    async def remove_model(self, name: str) -> None:
        """Remove a model from the cluster. Raises Conflict while a deployment names it."""
        await self._call(self._router.RemoveModel, router_pb2.RemoveModelRequest(name=name))

    async def deploy(
        self, deployment: DeploymentRecord, *, gear_plan: str = ""
    ) -> DeploymentRecord:
        """Create or replace a deployment; return it as the cluster holds it.

        `gear_plan`: content of a plan's file, whose gears it then follows; empty: its own stages.
        Raises InvalidRequest, NotFound or Conflict that say what to change.
        """
        check_deployment_shape(deployment)
        request = router_pb2.PutDeploymentRequest(
            deployment=deployment_to_pb(deployment), gear_plan=gear_plan
        )
        reply = await self._call(self._router.PutDeployment, request)
        return deployment_from_pb(reply.deployment)

    async def remove_deployment(self, name: str) -> None:
        """Remove a deployment; its models stay registered."""
        request = router_pb2.RemoveDeploymentRequest(name=name)
        await self._call(self._router.RemoveDeployment, request)

    async def status(self) -> router_pb2.GetStatusReply:
        """Return nodes, workers, replicas, queues and the leader as the router sees them."""
        return await self._call(self._router.GetStatus, router_pb2.GetStatusRequest())

    async def explain_model(self, model: str) -> scheduler_pb2.ExplainReply:
        """Return the scheduler's last decisions about a model."""
        return await self._call(self._router.Explain, scheduler_pb2.ExplainRequest(model=model))

    async def explain_request(self, request_id: str) -> scheduler_pb2.ExplainReply:
        """Return what happened to a recent request."""
        request = scheduler_pb2.ExplainRequest(request_id=request_id)
        return await self._call(self._router.Explain, request)

    async def _call(self, method: Callable[..., Awaitable[T]], request: object) -> T:
        try:
            return await method(request, timeout=_ADMIN_TIMEOUT_S, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error) from error
