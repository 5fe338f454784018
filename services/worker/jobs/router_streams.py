"""The push streams of one worker, one to each router with jobs here, and which routers are gone."""

from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Protocol

from gearfall.core.ids import RouterId
from services.worker.jobs.push_stream import PushListener, PushStream

KEPT_GONE_ROUTERS = 1024


class StreamOpener(Protocol):
    """Makes the push stream to one router."""

    def __call__(self, address: str, listener: PushListener) -> PushStream:
        """Return a stream that was not started yet."""
        ...


class RouterStreams:
    """Owner of the streams by router address."""

    def __init__(
        self,
        open_stream: StreamOpener,
        listener: PushListener,
        is_router_alive: Callable[[RouterId], bool],
    ) -> None:
        """`listener` hears what routers answer."""
        self._open_stream = open_stream
        self._listener = listener
        self.is_alive = is_router_alive
        """Whether cluster state says that a router is there."""
        self._streams: dict[str, PushStream] = {}
        self._gone: OrderedDict[RouterId, None] = OrderedDict()

    async def stop(self) -> None:
        """End every stream."""
        streams, self._streams = list(self._streams.values()), {}
        for stream in streams:
            await stream.stop()

    def open(self, address: str) -> PushStream:
        """Return the stream to the router there; it is started if there was none."""
        if address not in self._streams:
            self._streams[address] = self._open_stream(address, self._listener)
            self._streams[address].start()
        return self._streams[address]

    def get(self, address: str) -> PushStream | None:
        """Return the stream to a router, if there is one."""
        return self._streams.get(address)

    def __getitem__(self, address: str) -> PushStream:
        return self._streams[address]

    def is_gone(self, router_id: RouterId) -> bool:
        """Whether a router could not be reached lately, and cluster state does not have it."""
        return router_id in self._gone and not self.is_alive(router_id)

    def abandon(self, address: str, router_ids: Iterable[RouterId]) -> None:
        """Forget the stream to an address and remember that these routers can't be reached."""
        self._streams.pop(address, None)
        self._gone.update(dict.fromkeys(router_ids))
        while len(self._gone) > KEPT_GONE_ROUTERS:
            self._gone.popitem(last=False)
