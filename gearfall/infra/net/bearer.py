"""Bearer keys at gRPC doors: `authorization: Bearer KEY`, checked before a method runs."""

import hmac
from collections.abc import Awaitable, Callable, Mapping, Sequence
from hashlib import blake2b
from typing import Any

import grpc

from gearfall.core.errors import Unauthenticated

HEADER = "authorization"
SECRET_VARIABLE = "GEARFALL_CLUSTER_SECRET"  # noqa: S105 - the variable's name, not a secret
"""Environment variable with the key by which a cluster's own services know each other."""
_TENANT_BYTES = 6

Metadata = tuple[tuple[str, str], ...]


def bearer_metadata(key: str) -> Metadata:
    """Return what a caller sends; nothing for an empty key."""
    return ((HEADER, f"Bearer {key}"),) if key else ()


def check_bearer(header: str, keys: Sequence[str]) -> None:
    """Raise Unauthenticated unless `header` carries one of `keys`; without keys all is open."""
    if not keys:
        return
    scheme, _, given = header.partition(" ")
    # Every key is compared, in constant time each, so that the time tells nothing.
    matches = [hmac.compare_digest(given.strip().encode(), key.encode()) for key in keys]
    if scheme.lower() != "bearer" or not any(matches):
        raise Unauthenticated("no or unknown API key: send 'Authorization: Bearer KEY'")


def tenant_of(header: str, keys: Sequence[str], claimed: str) -> str:
    """Return the tenant of a caller whose `header` opened one of `keys`.

    Whoever has another key is another tenant, whatever is claimed: neither meets what is cached for
    the other. Within a key, and where there is one or none, the claim counts. A key shows as a
    digest, which metrics may tell.
    """
    if len(set(keys)) < 2:
        return claimed
    given = header.partition(" ")[2].strip().encode()
    own = blake2b(given, digest_size=_TENANT_BYTES).hexdigest()
    return f"{own}/{claimed}" if claimed else own


class BearerInterceptor(grpc.aio.ServerInterceptor):
    """Guards services by name; those that are not named (health, reflection) stay open."""

    def __init__(self, keys_by_service: Mapping[str, Sequence[str]]) -> None:
        """Keys by full service name (gearfall.v1.Router); a service without keys is open."""
        self._keys_by_service = {name: tuple(keys) for name, keys in keys_by_service.items()}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Go on, or answer UNAUTHENTICATED."""
        service = handler_call_details.method.strip("/").partition("/")[0]
        keys = self._keys_by_service.get(service, ())
        metadata = dict(handler_call_details.invocation_metadata or ())
        header = metadata.get(HEADER, "")
        try:
            check_bearer(header if isinstance(header, str) else "", keys)
        except Unauthenticated as error:
            return _refuse(error)
        return await continuation(handler_call_details)


def _refuse(error: Unauthenticated) -> Any:
    async def refuse(_request: Any, _context: Any) -> Any:
        raise error

    # Whatever the method's arity: this one does not wait for a message before it answers.
    return grpc.stream_unary_rpc_method_handler(refuse)
