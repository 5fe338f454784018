"""The error tree as OpenAI's error bodies and HTTP status codes."""

import math
from dataclasses import dataclass

import orjson
from starlette.responses import Response

from gearfall.core import errors
from gearfall.core.errors import GearfallError, InvalidRequest

BODY_TOO_LARGE = "request_too_large"


@dataclass(frozen=True, slots=True)
class HttpError:
    """How one class of errors looks over HTTP."""

    status: int
    type: str
    code: str | None = None
    """When the error names none."""


BY_ERROR: dict[type[GearfallError], HttpError] = {
    errors.InvalidRequest: HttpError(400, "invalid_request_error"),
    errors.Unauthenticated: HttpError(401, "invalid_request_error", "invalid_api_key"),
    errors.PermissionDenied: HttpError(403, "invalid_request_error", "permission_denied"),
    errors.NotFound: HttpError(404, "invalid_request_error", "not_found"),
    errors.Conflict: HttpError(409, "invalid_request_error", "conflict"),
    errors.Overloaded: HttpError(429, "rate_limit_error", "rate_limit_exceeded"),
    errors.DeadlineExceeded: HttpError(504, "server_error", "deadline_exceeded"),
    errors.Unavailable: HttpError(503, "server_error", "unavailable"),
    errors.CorruptCheckpoint: HttpError(500, "server_error", "corrupt_checkpoint"),
    errors.Internal: HttpError(500, "server_error", "internal_error"),
}


def body_too_large(limit_bytes: int) -> InvalidRequest:
    """Return the error of a request body over the limit; its status is 413."""
    return InvalidRequest(f"the body is over {limit_bytes} bytes", code=BODY_TOO_LARGE)


def status_of(error: GearfallError) -> int:
    """Return the HTTP status of `error`."""
    return 413 if error.code == BODY_TOO_LARGE else BY_ERROR[type(error)].status


def error_body(error: GearfallError) -> dict[str, object]:
    """Return OpenAI's error object."""
    kind = BY_ERROR[type(error)]
    return _body(error.message, kind.type, error.param, error.code or kind.code)


def error_response(error: GearfallError) -> Response:
    """Return the HTTP answer; with Retry-After where a time to come back is known."""
    headers = {}
    if error.retry_after_s is not None:
        headers["retry-after"] = str(max(math.ceil(error.retry_after_s), 1))
        headers["retry-after-ms"] = str(math.ceil(error.retry_after_s * 1000))
    if isinstance(error, errors.Unauthenticated):
        headers["www-authenticate"] = "Bearer"
    return _json(error_body(error), status_of(error), headers)


def http_error_response(
    status: int, message: str, headers: dict[str, str] | None = None
) -> Response:
    """Return the answer for what never reached a handler: no such route, wrong method."""
    code = {404: "not_found", 405: "method_not_allowed"}.get(status)
    return _json(_body(message, "invalid_request_error", None, code), status, headers or {})


def _body(message: str, kind: str, param: str | None, code: str | None) -> dict[str, object]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _json(body: dict[str, object], status: int, headers: dict[str, str]) -> Response:
    return Response(orjson.dumps(body), status, headers, media_type="application/json")
