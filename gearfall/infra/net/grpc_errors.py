"""The error tree over gRPC: one table to status codes and back, and its interceptor."""

import asyncio
import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeAlias

import grpc

from gearfall.core import errors

_log = logging.getLogger(__name__)

STATUS_BY_ERROR: dict[type[errors.GearfallError], grpc.StatusCode] = {
    errors.InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    errors.Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    errors.PermissionDenied: grpc.StatusCode.PERMISSION_DENIED,
    errors.NotFound: grpc.StatusCode.NOT_FOUND,
    errors.Conflict: grpc.StatusCode.FAILED_PRECONDITION,
    errors.Overloaded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.Unavailable: grpc.StatusCode.UNAVAILABLE,
    errors.CorruptCheckpoint: grpc.StatusCode.DATA_LOSS,
    errors.Internal: grpc.StatusCode.INTERNAL,
}
"""One code per error class, so that the way back is exact."""

_ERROR_BY_STATUS = {status: error for error, status in STATUS_BY_ERROR.items()}
_PARAM_KEY = "gearfall-param"
_RETRY_KEY = "gearfall-retry-after-s"
_CODE_KEY = "gearfall-code"
_MOST_CHARACTERS = 600
"""Of a message: what an error tells of a hostile request must fit into 8 KiB of metadata."""

Trailers = tuple[tuple[str, str], ...]
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


def status_of(error: errors.GearfallError) -> grpc.StatusCode:
    """Return the gRPC status code that carries `error`."""
    return STATUS_BY_ERROR[type(error)]


def trailers_of(error: errors.GearfallError) -> Trailers:
    """Return the trailing metadata that carries the error's fields."""
    trailers = []
    if error.param is not None:
        trailers.append((_PARAM_KEY, error.param.encode("ascii", "replace").decode()))
    if error.code is not None:
        trailers.append((_CODE_KEY, error.code))
    if error.retry_after_s is not None:
        trailers.append((_RETRY_KEY, f"{error.retry_after_s:.3f}"))
    return tuple(trailers)


def error_from_rpc(rpc_error: grpc.aio.AioRpcError) -> errors.GearfallError:
    """Return the gearfall error that a peer raised, or the nearest one for a code of gRPC's own."""
    trailers = dict(rpc_error.trailing_metadata() or ())
    kind = _ERROR_BY_STATUS.get(rpc_error.code(), errors.Internal)
    retry = trailers.get(_RETRY_KEY)
    return kind(
        rpc_error.details() or rpc_error.code().name,
        param=_as_text(trailers.get(_PARAM_KEY)),
        retry_after_s=_as_seconds(retry),
        code=_as_text(trailers.get(_CODE_KEY)),
    )


def _as_text(value: str | bytes | None) -> str | None:
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _as_seconds(value: str | bytes | None) -> float | None:
    try:
        return None if value is None else float(value)
    except ValueError:
        return None


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Turns what a method raises into a status; an unknown exception is logged as INTERNAL."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Wrap the method's handler, whatever its arity."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method = handler_call_details.method
        codec = (handler.request_deserializer, handler.response_serializer)
        if handler.unary_unary:
            return grpc.unary_unary_rpc_method_handler(_one(handler.unary_unary, method), *codec)
        if handler.stream_unary:
            return grpc.stream_unary_rpc_method_handler(_one(handler.stream_unary, method), *codec)
        if handler.unary_stream:
            return grpc.unary_stream_rpc_method_handler(_many(handler.unary_stream, method), *codec)
        return grpc.stream_stream_rpc_method_handler(_many(handler.stream_stream, method), *codec)


def _one(call: Callable[[Any, Any], Awaitable[Any]], method: str) -> Callable[..., Awaitable[Any]]:
    async def guarded(request: Any, context: Context) -> Any:
        try:
            return await call(request, context)
        except Exception as error:
            await _abort(context, error, method)

    return guarded


def _many(call: Callable[[Any, Any], Any], method: str) -> Callable[..., Any]:
    """Guard a method with a stream of replies, yielded or (health's Watch) written."""
    if not inspect.isasyncgenfunction(call):
        return _one(call, method)

    async def guarded(request: Any, context: Context) -> AsyncIterator[Any]:
        try:
            async for reply in call(request, context):
                yield reply
        except Exception as error:
            await _abort(context, error, method)

    return guarded


async def _abort(context: Context, error: Exception, method: str) -> None:
    if isinstance(error, (grpc.aio.AbortError, asyncio.CancelledError)):
        raise error
    if not isinstance(error, errors.GearfallError):
        _log.exception("unexpected error in a gRPC method", extra={"method": method})
        error = errors.Internal(f"internal error: {type(error).__name__}")
    message = error.message
    if len(message) > _MOST_CHARACTERS:
        message = f"{message[:_MOST_CHARACTERS]}..."
    await context.abort(status_of(error), message, trailers_of(error))
