"""A gRPC server with health, reflection, limits and the error mapping that every service shares."""

from collections.abc import Callable, Sequence

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection

from gearfall.core.errors import Unavailable
from gearfall.infra.net.grpc_channels import SERVER_OPTIONS
from gearfall.infra.net.grpc_errors import ErrorInterceptor


class GrpcServer:
    """A started server; `address` is where it listens."""

    def __init__(self, server: grpc.aio.Server, health: HealthServicer, address: str) -> None:
        self._server = server
        self._health = health
        self.address = address

    async def stop(self, grace_s: float = 2.0) -> None:
        """Report NOT_SERVING, let running calls end within `grace_s`, then close."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)


async def start_server(
    listen: str,
    add_servicers: Callable[[grpc.aio.Server], None],
    service_names: Sequence[str],
    *,
    interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
) -> GrpcServer:
    """Serve on `listen` (host:port; port 0 picks one).

    `service_names` are full names (gearfall.v1.Router) for health and reflection. Raises
    Unavailable when the address can't be bound.
    """
    server = grpc.aio.server(
        interceptors=(ErrorInterceptor(), *interceptors), options=SERVER_OPTIONS
    )
    # A method that is registered beside its service is accepted by a task of its own, and with each
    # call the server begins to wait for all of them anew: that took a tenth of a short call.
    server.add_registered_method_handlers = _register_nothing  # type: ignore[method-assign]
    add_servicers(server)
    health = HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    names = (*service_names, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name)
    reflection.enable_server_reflection((*names, reflection.SERVICE_NAME), server)
    try:
        port = server.add_insecure_port(listen)
    except RuntimeError as error:
        raise Unavailable(f"cannot listen on {listen}: {error}") from error
    await server.start()
    for name in ("", *service_names):
        await health.set(name, health_pb2.HealthCheckResponse.SERVING)
    return GrpcServer(server, health, f"{listen.rsplit(':', 1)[0]}:{port}")


def _register_nothing(service_name: str, method_handlers: object) -> None:
    """Leave a service's methods to its generic handler, which is added beside them."""
