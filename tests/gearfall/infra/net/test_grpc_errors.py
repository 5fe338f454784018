"""Every error of the tree crosses gRPC and comes back as itself, with its fields."""

import re
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from gearfall.core import errors
from gearfall.infra.net.grpc_channels import open_channel
from gearfall.infra.net.grpc_errors import STATUS_BY_ERROR, error_from_rpc
from gearfall.infra.net.grpc_server import start_server

ROOT = Path(__file__).parents[4]


def tree(root: type[errors.GearfallError]) -> Iterator[type[errors.GearfallError]]:
    for child in root.__subclasses__():
        yield child
        yield from tree(child)


ALL_ERRORS = list(tree(errors.GearfallError))


def test_every_error_of_the_tree_has_its_own_status() -> None:
    assert set(STATUS_BY_ERROR) == set(ALL_ERRORS)
    assert len(set(STATUS_BY_ERROR.values())) == len(ALL_ERRORS)


def test_the_tree_is_drawn_in_the_module_docstring() -> None:
    drawing = errors.__doc__ or ""
    assert [kind.__name__ for kind in ALL_ERRORS if kind.__name__ not in drawing] == []


def test_no_error_of_the_tree_stands_in_another_module() -> None:
    """Where it would be mapped, or found unmapped, only by who happens to import it."""
    names = "|".join(["GearfallError", *(kind.__name__ for kind in ALL_ERRORS)])
    derived = re.compile(rf"^class \w+\((?:.*\b)?(?:{names})\b", re.MULTILINE)
    holding = [
        path
        for package in ("gearfall", "services")
        for path in (ROOT / package).rglob("*.py")
        if derived.search(path.read_text())
    ]
    assert [path.relative_to(ROOT).as_posix() for path in holding] == ["gearfall/core/errors.py"]


class _Raising(grpc.GenericRpcHandler):
    """Serves /t/<ErrorName> (unary) and /s/<ErrorName> (stream, after one message)."""

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        _, kind, name = handler_call_details.method.split("/")
        error: type[errors.GearfallError] | None = getattr(errors, name, None)

        async def unary(request: bytes, context: object) -> bytes:
            if error is None:
                raise ValueError("told why")
            told = request.decode() or "told why"
            raise error(told, param="field", retry_after_s=1.5, code="which_one")

        async def stream(request: bytes, context: object) -> AsyncIterator[bytes]:
            yield b"first"
            await unary(request, context)

        if kind == "s":
            return grpc.unary_stream_rpc_method_handler(stream)
        return grpc.unary_unary_rpc_method_handler(unary)


@pytest.fixture
async def channel() -> AsyncIterator[grpc.aio.Channel]:
    server = await start_server(
        "127.0.0.1:0", lambda s: s.add_generic_rpc_handlers((_Raising(),)), ["gearfall.test"]
    )
    async with open_channel(server.address) as opened:
        yield opened
    await server.stop(0)


async def _ask(channel: grpc.aio.Channel, name: str, told: bytes = b"") -> None:
    method: Any = channel.unary_unary(f"/t/{name}")
    await method(told, timeout=5)


@pytest.mark.parametrize("kind", ALL_ERRORS, ids=lambda kind: kind.__name__)
async def test_an_error_comes_back_as_itself(
    channel: grpc.aio.Channel, kind: type[errors.GearfallError]
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await _ask(channel, kind.__name__)
    error = error_from_rpc(caught.value)
    assert (type(error), error.message, error.param) == (kind, "told why", "field")
    assert (error.retry_after_s, error.code) == (1.5, "which_one")


@pytest.mark.parametrize("text", ["x" * 10**6, "\N{PILE OF POO}" * 10**5])
async def test_a_message_without_end_is_cut_and_keeps_its_kind(
    channel: grpc.aio.Channel, text: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await _ask(channel, "NotFound", text.encode())
    error = error_from_rpc(caught.value)
    assert isinstance(error, errors.NotFound)
    assert error.message == f"{text[:600]}..."


async def test_a_stream_delivers_what_came_before_its_error(channel: grpc.aio.Channel) -> None:
    method: Any = channel.unary_stream("/s/Conflict")
    call = method(b"", timeout=5)
    assert await call.read() == b"first"
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    assert isinstance(error_from_rpc(caught.value), errors.Conflict)


async def test_an_unexpected_exception_shows_its_kind_and_not_its_text(
    channel: grpc.aio.Channel,
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await _ask(channel, "NoSuchError")
    assert isinstance(error_from_rpc(caught.value), errors.Internal)
    assert "told why" not in (caught.value.details() or "")
