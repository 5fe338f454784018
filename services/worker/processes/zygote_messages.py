"""Messages between a worker and its zygote: msgpack frames over one Unix socket pair.

Worker to zygote: ForkEngine, with the engine's end of its own socket pair as the only descriptor,
and PrepareEngine whenever there is time to make the next fork ahead of need.
Zygote to worker: ZygoteReady first, then one EngineForked for each request and one EngineExited
for each engine, in any order between engines.
"""

import msgspec


class ForkEngine(msgspec.Struct, frozen=True, tag=True):
    """Fork one engine process that speaks on the socket beside this message."""

    request: int
    """Chosen by the worker, repeated in the answer."""


class PrepareEngine(msgspec.Struct, frozen=True, tag=True):
    """Have a process ready that the next ForkEngine is answered with. Not answered itself."""


class ZygoteReady(msgspec.Struct, frozen=True, tag=True):
    """Everything heavy is imported; forks are cheap from now on."""

    pid: int
    import_s: float


class EngineForked(msgspec.Struct, frozen=True, tag=True):
    """The engine of `request` runs."""

    request: int
    pid: int


class ForkFailed(msgspec.Struct, frozen=True, tag=True):
    """The system refused the fork of `request`."""

    request: int
    error: str


class EngineExited(msgspec.Struct, frozen=True, tag=True):
    """An engine process ended and was reaped."""

    pid: int
    exit_code: int
    """0 to 255; 0 when a signal ended it."""
    signal: int
    """Signal that ended it, or 0."""


WorkerRequest = ForkEngine | PrepareEngine
ZygoteMessage = ZygoteReady | EngineForked | ForkFailed | EngineExited
