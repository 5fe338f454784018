"""The worker's drain over HTTP, beside its metrics: what a handler of spot notices calls."""

import logging

from google.protobuf.json_format import MessageToDict
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from gearfall.core.errors import GearfallError, InvalidRequest, PermissionDenied, Unauthenticated
from gearfall.infra.net.bearer import HEADER, SECRET_VARIABLE, check_bearer
from services.worker.service import WorkerService
from services.worker.servicer import drain_reply_to_pb

PATH = "/drain"
_STATUS = {InvalidRequest: 400, Unauthenticated: 401, PermissionDenied: 403}

_log = logging.getLogger(__name__)


def drain_route(service: WorkerService, secret: str) -> Route:
    """Return the route of `POST /drain?deadline_s=`; `secret`: the cluster's, as a bearer key.

    Without a secret it refuses: any web page that a browser beside the worker shows could call it.
    """

    async def drain(request: Request) -> Response:
        try:
            deadline_s = _check(request, secret)
            report = await service.drain(deadline_s)
        except GearfallError as error:
            return _refusal(error)
        reply = drain_reply_to_pb(report)
        _log.info(
            "drained on notice",
            extra={"moved_jobs": reply.migrated_jobs, "lost_jobs": len(reply.lost_job_ids)},
        )
        return JSONResponse(
            MessageToDict(
                reply,
                preserving_proto_field_name=True,
                always_print_fields_with_no_presence=True,
            )
        )

    return Route(PATH, drain, methods=["POST"])


def _check(request: Request, secret: str) -> float:
    """Return the deadline in seconds. Raises what is wrong with the request."""
    if not secret:
        raise PermissionDenied(f"this cluster has no secret: set {SECRET_VARIABLE} on its machines")
    check_bearer(request.headers.get(HEADER, ""), (secret,))
    given = request.query_params.get("deadline_s", "")
    try:
        return float(given)
    except ValueError as error:
        message = f"deadline_s must be a number of seconds, not {given!r}"
        raise InvalidRequest(message, param="deadline_s") from error


def _refusal(error: GearfallError) -> Response:
    body = {"error": {"type": type(error).__name__, "message": error.message, "param": error.param}}
    return JSONResponse(body, status_code=_STATUS.get(type(error), 500))
