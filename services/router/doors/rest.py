"""The REST door: OpenAI's endpoints, health and metrics.

FastAPI describes the API; its handlers are raw Starlette ones, because validation by models and
dependency injection cost more than the rest of a request's way here.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

import orjson
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from gearfall.core.errors import GearfallError, Internal, NotFound
from gearfall.core.ids import DeploymentName, ModelName
from gearfall.infra.net.bearer import HEADER, check_bearer, tenant_of
from services.router.cluster.catalogue import Catalogue
from services.router.cluster.cluster_status import ClusterStatus
from services.router.doors.answer_facts import headers_of
from services.router.doors.openai_errors import body_too_large, error_response, http_error_response
from services.router.doors.rest_answers import AnswerShape, ChatShape, CompletionShape
from services.router.doors.rest_bodies import GenerationBody
from services.router.doors.rest_schema import (
    chat_from_json,
    completion_from_json,
    request_from_chat,
    request_from_completion,
    schemas,
)
from services.router.doors.sse import (
    EventStream,
    close_when_gone,
    described,
    ends_in_order,
    first_batch,
)
from services.router.generation import Delta, GenerationRequest, Replace
from services.router.running_request import RunningRequest
from services.router.service import RouterService

_log = logging.getLogger(__name__)

MAX_BODY_BYTES = 4 * 1024 * 1024
_SERVED = ("/v1/chat/completions", "/v1/completions", "/v1/models")
_DRAIN_BYTES = 64 * 1024 * 1024
_DRAIN_S = 10.0
Endpoint = Callable[[Request], Awaitable[Response]]


class RestDoor:
    """Builds the ASGI application over the router's service."""

    def __init__(
        self,
        service: RouterService,
        catalogue: Catalogue,
        status: ClusterStatus,
        *,
        api_keys: Sequence[str] = (),
        max_body_bytes: int = MAX_BODY_BYTES,
    ) -> None:
        """`api_keys`: any of them opens /v1; none leaves it open."""
        self._service = service
        self._catalogue = catalogue
        self._status = status
        self._api_keys = tuple(api_keys)
        self._max_body_bytes = max_body_bytes

    def build_app(self) -> FastAPI:
        """Return the application."""
        app = FastAPI(title="gearfall", docs_url="/docs", redoc_url=None)
        app.add_route("/v1/chat/completions", self._guard(self._chat), methods=["POST"])
        app.add_route("/v1/completions", self._guard(self._complete), methods=["POST"])
        app.add_route("/v1/models", self._guard(self._list_models), methods=["GET"])
        app.add_route("/v1/models/{name}", self._guard(self._get_model), methods=["GET"])
        app.add_route("/healthz", _healthz, methods=["GET"])
        app.add_route("/readyz", self._readyz, methods=["GET"])
        app.add_route("/metrics", self._metrics, methods=["GET"])
        app.add_exception_handler(HTTPException, _on_http_error)
        app.add_exception_handler(Exception, _on_unexpected)
        app.openapi = lambda: _describe(app)  # type: ignore[method-assign]
        return app

    def _guard(self, endpoint: Endpoint) -> Endpoint:
        """Check the key and turn every error into OpenAI's shape."""

        async def guarded(request: Request) -> Response:
            try:
                self._authenticate(request)
                return await endpoint(request)
            except GearfallError as error:
                return error_response(error)
            except ClientDisconnect:
                return Response(status_code=499)
            except Exception:
                _log.exception("a REST handler failed", extra={"path": request.url.path})
                return error_response(Internal("internal error"))

        return guarded

    def _authenticate(self, request: Request) -> None:
        check_bearer(request.headers.get(HEADER, ""), self._api_keys)

    async def _chat(self, request: Request) -> Response:
        body = chat_from_json(await _read_body(request, self._max_body_bytes))
        wanted = request_from_chat(body, request.headers.get("x-request-id", ""))
        return await self._answer(request, body, wanted, ChatShape)

    async def _complete(self, request: Request) -> Response:
        body = completion_from_json(await _read_body(request, self._max_body_bytes))
        wanted = request_from_completion(body, request.headers.get("x-request-id", ""))
        return await self._answer(request, body, wanted, CompletionShape)

    async def _answer(
        self,
        request: Request,
        body: GenerationBody,
        wanted: GenerationRequest,
        shape_of: type[AnswerShape],
    ) -> Response:
        header = request.headers.get(HEADER, "")
        wanted = replace(wanted, tenant=tenant_of(header, self._api_keys, wanted.tenant))
        running = await self._service.start(wanted)
        shape = shape_of(
            request_id=running.request_id,
            model=wanted.model,
            created_unix_s=int(time.time()),
            with_logprobs=wanted.logprobs,
        )
        try:
            if body.stream:
                return await self._stream(request, running, body, wanted, shape)
            return await _collect(request, running, wanted, shape)
        except BaseException:
            running.close()
            raise

    async def _stream(
        self,
        request: Request,
        running: RunningRequest,
        body: GenerationBody,
        wanted: GenerationRequest,
        shape: AnswerShape,
    ) -> Response:
        """Wait a while for the first event: what fails before it has its own status."""
        first, batches = await first_batch(request.receive, running)
        return EventStream(
            running,
            batches,
            first,
            shape,
            n=wanted.n,
            wants_usage=body.wants_usage,
            headers=_early_headers(running),
        )

    async def _list_models(self, _request: Request) -> Response:
        view = self._catalogue.view
        models = [self._model(name) for name in sorted((*view.deployments, *view.models))]
        return _json({"object": "list", "data": models})

    async def _get_model(self, request: Request) -> Response:
        name = request.path_params["name"]
        view = self._catalogue.view
        if name not in view.deployments and name not in view.models:
            raise NotFound(
                f"the model {name[:96]!r} does not exist", param="model", code="model_not_found"
            )
        return _json(self._model(name))

    def _model(self, name: str) -> dict[str, Any]:
        deployment = self._catalogue.view.deployments.get(DeploymentName(name))
        names = [stage.model for stage in deployment.stages] if deployment else [ModelName(name)]
        is_ready, is_starting = self._service.readiness(names[0])
        record = None if deployment else self._catalogue.view.models.get(ModelName(name))
        base = "" if record is None else record.base
        return {
            "id": name,
            "object": "model",
            "created": 0,
            "owned_by": "gearfall",
            # What other servers say of an adapter: the model that it was trained on.
            "parent": base or None,
            "gearfall": {
                "kind": "deployment" if deployment else "adapter" if base else "model",
                "stages": names,
                "readiness": "ready" if is_ready else "starting" if is_starting else "cold",
                "expected_start_s": self._service.expected_start_s(names[0]),
            },
        }

    async def _readyz(self, _request: Request) -> Response:
        words = await self._status.unreachable()
        if self._service.is_stopping:
            words.append("this router is stopping")  # a balancer sends the next request elsewhere
        return _json({"ready": not words, "degraded": words}, status=503 if words else 200)

    async def _metrics(self, _request: Request) -> Response:
        depths, reachable = await asyncio.gather(
            self._status.queue_depths(), self._status.reachable()
        )
        self._service.metrics.show_reachable(reachable)
        self._service.desk.show()
        text = self._service.metrics.render(
            self._service.admission.running_choices,
            {model: (depth.waiting, depth.claimed) for model, depth in depths.items()},
            self._service.gears.gears_in_force(),
        )
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


async def _collect(
    request: Request, running: RunningRequest, wanted: GenerationRequest, shape: AnswerShape
) -> Response:
    """Return the whole answer; a client that goes away meanwhile stops the work."""
    watch = asyncio.create_task(close_when_gone(request.receive, running), name="client-watch")
    deltas: dict[int, list[Delta]] = {}
    try:
        async for batch in running.batches():
            for event in batch:
                if isinstance(event, Delta):
                    deltas.setdefault(event.choice, []).append(event)
                elif isinstance(event, Replace):
                    deltas.pop(event.choice, None)
    finally:
        watch.cancel()
        running.close()
    ends = ends_in_order(running)
    if len(ends) < running.choices:
        return Response(status_code=499)
    body = shape.whole(deltas, ends, wanted.n, {"gearfall": described(running)})
    headers = _early_headers(running) | headers_of(ends)
    return Response(body, 200, headers, media_type="application/json")


def _early_headers(running: RunningRequest) -> dict[str, str]:
    headers = {
        "x-request-id": running.request_id,  # what OpenAI's clients report
        "x-gearfall-request-id": running.request_id,
        "x-gearfall-expected-start-s": f"{running.expected_start_s:.3f}",
    }
    if running.cache:
        headers["x-gearfall-cache"] = running.cache
    return headers | ({"x-gearfall-gear": running.gear.label} if running.gear else {})


async def _read_body(request: Request, limit_bytes: int) -> bytes:
    """Return the body; raise InvalidRequest (413) for one over the limit, before it is held."""
    declared = request.headers.get("content-length", "0")
    is_declared_large = declared.isdecimal() and int(declared) > limit_bytes
    parts: list[bytes] = []
    size = 0
    if not is_declared_large:
        async for part in request.stream():
            size += len(part)
            if size > limit_bytes:
                break
            parts.append(part)
        else:
            return b"".join(parts)
    await _drain(request)
    raise body_too_large(limit_bytes)


async def _drain(request: Request) -> None:
    """Throw away the rest of a body: most clients read the answer only after they sent it all."""
    drained = 0
    try:
        async with asyncio.timeout(_DRAIN_S):
            while drained <= _DRAIN_BYTES:
                message = await request.receive()
                drained += len(message.get("body", b""))
                if not message.get("more_body", False):
                    return
    except TimeoutError:
        return


async def _healthz(_request: Request) -> Response:
    return _json({"alive": True})


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path[:200]}: {error.detail}"
    if error.status_code == 404:
        message += f"; served are {', '.join(_SERVED)}"
    return http_error_response(error.status_code, message, dict(error.headers or {}))


async def _on_unexpected(_request: Request, _error: Exception) -> Response:
    return error_response(Internal("internal error"))


def _json(body: object, status: int = 200) -> Response:
    return Response(orjson.dumps(body), status, media_type="application/json")


def _describe(app: FastAPI) -> dict[str, Any]:
    """Return the OpenAPI description; the bodies' schemas are those that are really checked."""
    if app.openapi_schema is None:
        described = get_openapi(title=app.title, version="1", routes=app.routes)
        described.setdefault("components", {})["schemas"] = dict(schemas())
        described["paths"] = {
            "/v1/chat/completions": {"post": _operation("Answer a conversation", "ChatBody")},
            "/v1/completions": {"post": _operation("Continue a prompt", "CompletionBody")},
            "/v1/models": {"get": _operation("List models and deployments")},
            "/v1/models/{name}": {"get": _operation("One model or deployment", path="name")},
            "/healthz": {"get": _operation("Whether the process is alive")},
            "/readyz": {"get": _operation("Whether cluster state and queue can be reached")},
            "/metrics": {"get": _operation("Prometheus metrics")},
        }
        app.openapi_schema = described
    return app.openapi_schema


def _operation(summary: str, body: str = "", path: str = "") -> dict[str, Any]:
    operation: dict[str, Any] = {"summary": summary, "responses": {"200": {"description": "OK"}}}
    if body:
        schema = {"$ref": f"#/components/schemas/{body}"}
        content = {"application/json": {"schema": schema}}
        operation["requestBody"] = {"required": True, "content": content}
    if path:
        parameter = {"name": path, "in": "path", "required": True, "schema": {"type": "string"}}
        operation["parameters"] = [parameter]
    return operation
