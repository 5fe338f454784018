"""The blocking client: the asyncio client on a loop of its own in a background thread."""

import asyncio
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator
from typing import Self, TypeVar, Unpack

from gearfall.client.async_client import DEFAULT_ADDRESS, AsyncClient
from gearfall.client.request import Options, Prompt
from gearfall.client.values import Answer, Event
from gearfall.core.errors import Unavailable
from gearfall.core.records import DeploymentRecord
from gearfall.pb import router_pb2, scheduler_pb2, store_pb2

T = TypeVar("T")


class Client:
    """Speaks to one router from ordinary threads. Same methods and errors as AsyncClient.

    with Client("127.0.0.1:50051") as client:
        print(client.generate("arith", "12+30=").text)
    """

    def __init__(self, address: str = DEFAULT_ADDRESS, *, api_key: str = "") -> None:
        """`address`: host:port of the router's gRPC server; `api_key`: sent with every call."""
        self.address = address
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="gearfall-client", daemon=True
        )
        self._thread.start()
        self._async = self._run(_open(address, api_key))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the channel and end the background thread. Idempotent."""
        if self._loop.is_closed():
            return
        self._run(self._async.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def generate(self, model: str, prompt: Prompt, **options: Unpack[Options]) -> Answer:
        """Return the whole answer of a model or deployment."""
        return self._run(self._async.generate(model, prompt, **options))

    def stream(self, model: str, prompt: Prompt, **options: Unpack[Options]) -> Iterator[Event]:
        """Yield events as they come; closing the iterator stops the work."""
        return self._iterate(self._async.stream(model, prompt, **options))

    def cancel(self, request_id: str) -> None:
        """Stop a running request."""
        self._run(self._async.cancel(request_id))

    def models(self) -> router_pb2.ListModelsReply:
        """Return registered models and deployments."""
        return self._run(self._async.models())

    def register_model(
        self, name: str, path: str, *, base: str = ""
    ) -> Iterator[store_pb2.RegisterProgress]:
        """Register a directory with every live store; yield progress per node."""
        return self._iterate(self._async.register_model(name, path, base=base))

    def remove_model(self, name: str) -> None:
        """Remove a model from the cluster."""
        self._run(self._async.remove_model(name))

    def deploy(self, deployment: DeploymentRecord, *, gear_plan: str = "") -> DeploymentRecord:
        """Create or replace a deployment, with a gear plan's file that it follows."""
        return self._run(self._async.deploy(deployment, gear_plan=gear_plan))

    def remove_deployment(self, name: str) -> None:
        """Remove a deployment; its models stay registered."""
        self._run(self._async.remove_deployment(name))

    def status(self) -> router_pb2.GetStatusReply:
        """Return nodes, workers, replicas, queues and the leader."""
        return self._run(self._async.status())

    def explain_model(self, model: str) -> scheduler_pb2.ExplainReply:
        """Return the scheduler's last decisions about a model."""
        return self._run(self._async.explain_model(model))

    def explain_request(self, request_id: str) -> scheduler_pb2.ExplainReply:
        """Return what happened to a recent request."""
        return self._run(self._async.explain_request(request_id))

    def _run(self, work: Coroutine[object, object, T]) -> T:
        if self._loop.is_closed():
            work.close()
            raise Unavailable("this client is closed")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except KeyboardInterrupt:
            future.cancel()
            raise

    def _iterate(self, items: AsyncIterator[T]) -> Iterator[T]:
        try:
            while (item := self._run(_next(items))) is not None:
                yield item
        finally:
            if not self._loop.is_closed():
                self._run(items.aclose())  # type: ignore[attr-defined]


async def _open(address: str, api_key: str) -> AsyncClient:
    return AsyncClient(address, api_key=api_key)


async def _next(items: AsyncIterator[T]) -> T | None:
    return await anext(items, None)
