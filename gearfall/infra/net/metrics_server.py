"""What Prometheus scrapes: one small HTTP server beside a service's gRPC server, if asked for."""

import contextlib
from collections.abc import AsyncIterator, Callable, Sequence

from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gearfall.infra.net.http_server import start_http_server
from gearfall.infra.service_main import ServiceParser

PATH = "/metrics"

Render = Callable[[], bytes]
"""Returns the exposition text; called in the event loop, where it may read a service's state."""


def add_metrics_setting(parser: ServiceParser) -> None:
    """Let the service be told where to serve its metrics."""
    parser.add_setting(
        "--metrics",
        default="",
        meaning="host:port of the metrics server (port 0 picks one); none if empty",
    )


@contextlib.asynccontextmanager
async def serving_metrics(
    listen: str, render: Render, routes: Sequence[Route] = ()
) -> AsyncIterator[str]:
    """Serve `render`'s text at /metrics and give the address; give "" if `listen` is empty.

    `routes`: what the service answers at the same address.
    Raises Unavailable when the address can't be bound.
    """
    if not listen:
        yield ""
        return

    async def answer(_request: Request) -> Response:
        return Response(render(), media_type=CONTENT_TYPE_PLAIN_0_0_4)

    server = await start_http_server(Starlette(routes=[Route(PATH, answer), *routes]), listen)
    try:
        yield server.address
    finally:
        await server.stop()
