"""One place is asked at a time, and the next when it fails, however many notice at once."""

import asyncio
from typing import Any

import pytest

from gearfall.core.errors import CorruptCheckpoint, GearfallError, NotFound, Unavailable
from gearfall.core.ids import ModelName
from services.store.sources.relay import Place, Relay

CUT = Unavailable("cut off")


class FakeOrigin:
    """A place that answers with its name, or fails."""

    def __init__(self, name: str, *, error: GearfallError | None = None) -> None:
        self.name = name
        self.error = error
        self.is_closed = False

    async def read_into(self, partition: int, offset_bytes: int, destination: memoryview) -> None:
        if self.error is not None:
            raise self.error
        destination[:] = self.name.encode()

    async def close(self) -> None:
        self.is_closed = True


def place(origin: FakeOrigin, refusal: GearfallError | None = None) -> Place:
    async def open_origin() -> Any:
        await asyncio.sleep(0)
        if refusal is not None:
            raise refusal
        return origin

    return origin.name, open_origin


async def relay_of(*places: Place) -> Relay:
    relay = Relay(ModelName("m"), places)
    await relay.open()
    return relay


async def read(origin: Any) -> str:
    into = bytearray(1)
    await origin.read_into(0, 0, memoryview(into))
    return into.decode()


async def test_the_first_that_can_be_opened_is_asked():
    a, b = FakeOrigin("a"), FakeOrigin("b")
    relay = await relay_of(place(a, CUT), place(b))
    assert await read(relay) == "b"
    await relay.close()
    assert (a.is_closed, b.is_closed) == (False, True)


@pytest.mark.parametrize("refusals", [[], [CUT], [CUT, NotFound("gone")]])
async def test_nothing_can_be_opened(refusals):
    with pytest.raises(Unavailable):
        await relay_of(*(place(FakeOrigin("a"), refusal) for refusal in refusals))


async def test_many_that_fail_at_once_move_on_one_place():
    relay = await relay_of(*(place(FakeOrigin(name)) for name in "abc"))
    await asyncio.gather(*(relay.move_on(1, CUT) for _ in range(12)))
    assert relay.place == 2
    assert await read(relay) == "b"


async def test_who_stayed_away_half_way_is_asked_once_more_after_the_others():
    relay = await relay_of(*(place(FakeOrigin(name)) for name in "ab"))
    asked = []
    while relay.has_more:
        asked.append(await read(relay))
        await relay.move_on(relay.place, CUT)
    assert [*asked, await read(relay)] == ["a", "b", "a"]
    with pytest.raises(Unavailable):
        await relay.move_on(relay.place, CUT)


async def test_who_has_nothing_is_not_asked_again():
    relay = await relay_of(*(place(FakeOrigin(name)) for name in "ab"))
    await relay.move_on(1, NotFound("gone"))
    assert await read(relay) == "b"
    assert not relay.has_more


async def test_what_is_asked_is_asked_again_at_the_next_place():
    relay = await relay_of(
        place(FakeOrigin("a", error=CUT)),
        place(FakeOrigin("b", error=NotFound("gone"))),
        place(FakeOrigin("c")),
    )
    assert await relay.ask(read) == "c"


async def test_the_last_place_has_the_last_word():
    relay = await relay_of(place(FakeOrigin("a", error=NotFound("gone"))))
    with pytest.raises(Unavailable, match="cannot be fetched: gone"):
        await relay.ask(read)


async def test_a_lie_is_not_asked_for_elsewhere():
    lie = CorruptCheckpoint("other bytes")
    relay = await relay_of(place(FakeOrigin("a", error=lie)), place(FakeOrigin("b")))
    with pytest.raises(CorruptCheckpoint):
        await relay.ask(read)
