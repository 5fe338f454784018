"""Checkpoint directories that lie elsewhere: S3-compatible stores, web servers, file shares.

Ranges are asked for one by one and never retried here: the caller knows what it has already. Every
answer is held against the version that was seen first, so that an object replaced half way is
noticed even where the server ignores If-Match.
"""

import asyncio
import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import (
    BaseError,
    NotSupportedError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)
from obstore.store import ObjectStore, from_url

from gearfall.core.errors import (
    CorruptCheckpoint,
    GearfallError,
    InvalidRequest,
    NotFound,
    PermissionDenied,
    Unavailable,
)
from gearfall.core.ids import is_url as is_url  # noqa: PLC0414 - whoever reads URLs asks here

SCHEMES = ("s3", "gs", "az", "http", "https", "file")
STALL_S = 10.0
"""A connection that brings nothing for so long is given up."""
_CONNECT_S = 5.0
_REQUEST_S = 600.0


@dataclass(frozen=True, slots=True)
class ObjectVersion:
    """What identifies the bytes of one object."""

    size_bytes: int
    tag: str
    """The server's ETag; empty where it gives none, and then size and checksums must do."""


class RemoteDirectory:
    """One directory below a URL. Holds connections, nothing else; safe to share between tasks.

    Credentials, region and endpoint of S3 come from the environment (AWS_ACCESS_KEY_ID,
    AWS_ENDPOINT_URL and so on), as every S3 tool takes them.
    """

    def __init__(self, url: str, *, stall_s: float = STALL_S) -> None:
        """Connects at the first read. Raises InvalidRequest for a URL of no known kind."""
        self.url = url
        self._stall_s = stall_s
        self._store = _open_store(url, stall_s)

    async def stat(self, file: str) -> ObjectVersion:
        """Return what the server says about a file. Raises as `read_range` does."""
        with self._errors(file):
            async with asyncio.timeout(self._stall_s):
                meta = await obstore.head_async(self._store, file)
        return ObjectVersion(meta["size"], meta["e_tag"] or "")

    async def read_range(
        self, file: str, offset_bytes: int, size_bytes: int, version: ObjectVersion
    ) -> memoryview:
        """Return exactly these bytes of this version.

        Raises Unavailable when the connection is cut, stalls or falls short (ask again),
        CorruptCheckpoint when another version is served, NotFound or PermissionDenied when the
        server says so, InvalidRequest when it does not serve ranges.
        """
        options: obstore.GetOptions = {}
        # Some servers answer a range that is the whole as if none was asked for.
        if size_bytes != version.size_bytes:
            options["range"] = (offset_bytes, offset_bytes + size_bytes)
        if version.tag:
            options["if_match"] = version.tag
        with self._errors(file):
            async with asyncio.timeout(self._stall_s):
                answer = await obstore.get_async(self._store, file, options=options)
            found = ObjectVersion(answer.meta["size"], answer.meta["e_tag"] or "")
            if found != version:
                raise CorruptCheckpoint(
                    f"{self.url}/{file} was replaced while it was read: "
                    f"{_described(found)}, not {_described(version)}"
                )
            # The client's own limit on a silent connection ends this: it knows of each packet.
            content = memoryview(await answer.bytes_async())
        if len(content) != size_bytes:
            raise Unavailable(
                f"{self.url}/{file}: {len(content)} of {size_bytes} bytes came at {offset_bytes}"
            )
        return content

    async def read_file(self, file: str, max_bytes: int) -> bytes:
        """Return a whole small file. Raises CorruptCheckpoint when it exceeds `max_bytes`."""
        version = await self.stat(file)
        if version.size_bytes > max_bytes:
            raise CorruptCheckpoint(
                f"{self.url}/{file} is {version.size_bytes} bytes, at most {max_bytes} are allowed"
            )
        if version.size_bytes == 0:
            return b""
        return bytes(await self.read_range(file, 0, version.size_bytes, version))

    @contextlib.contextmanager
    def _errors(self, file: str) -> Iterator[None]:
        try:
            yield
        except (BaseError, OSError, ValueError, TimeoutError) as error:
            raise _typed(error, f"{self.url}/{file}") from error


def _open_store(url: str, stall_s: float) -> ObjectStore:
    parts = urlsplit(url)
    if parts.scheme not in SCHEMES:
        raise InvalidRequest(
            f"{url[:200]!r} is of no known kind: use {', '.join(SCHEMES)}", param="path"
        )
    if parts.username or parts.password:
        raise InvalidRequest(
            "a URL with a password in it would be shown to everybody", param="path"
        )
    try:
        if parts.scheme == "file":
            return from_url(url)
        return from_url(
            url,
            client_options={
                "allow_http": parts.scheme == "http" or _is_plain_endpoint(),
                "connect_timeout": timedelta(seconds=_CONNECT_S),
                "read_timeout": timedelta(seconds=stall_s),
                "timeout": timedelta(seconds=_REQUEST_S),
            },
            retry_config={"max_retries": 0, "retry_timeout": timedelta(seconds=1)},
        )
    except (BaseError, ValueError, OSError) as error:
        raise InvalidRequest(f"{url[:200]!r} can't be opened: {error}", param="path") from None


def _is_plain_endpoint() -> bool:
    names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
    return any(os.environ.get(name, "").startswith("http://") for name in names)


def _typed(error: Exception, what: str) -> GearfallError:
    match error:
        case FileNotFoundError():
            return NotFound(f"{what} is not there", param="path")
        case PreconditionError():
            return CorruptCheckpoint(f"{what} was replaced while it was read")
        case PermissionDeniedError() | UnauthenticatedError():
            return PermissionDenied(f"{what}: the server refuses this store's credentials")
        case NotSupportedError():
            return InvalidRequest(f"{what}: the server does not serve ranges", param="path")
        case TimeoutError():
            return Unavailable(f"{what}: no answer in time")
        case _:
            return Unavailable(f"{what} can't be read: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]


def _described(version: ObjectVersion) -> str:
    return f"{version.size_bytes} bytes tagged {version.tag or 'nothing'}"
