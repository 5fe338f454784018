"""Where a load's pool memory comes from."""

from collections.abc import Iterable, Sequence
from typing import Protocol

from gearfall.core.ids import ModelName
from gearfall.infra.memory.native import PoolFile


class PoolAllocator(Protocol):
    """Told of the pool's room from the pool's thread, asked for memory from any."""

    def begin(self, model: ModelName, size_bytes: int, free_bytes: int) -> None:
        """Room for a load was reserved, of which `free_bytes` is what is left."""
        ...

    def end(self, model: ModelName, free_bytes: int) -> None:
        """The load is over and allocates no more. Idempotent."""
        ...

    def fit(self, free_bytes: int) -> None:
        """The pool's free room is another one now."""
        ...

    def want(self, models: Iterable[Sequence[int]]) -> None:
        """The models that could be loaded next have partitions of these sizes."""
        ...

    def allocate(self, model: ModelName, size_bytes: int) -> PoolFile:
        """Return memory that held nothing before, for a load that has begun. May block.

        Raises OSError where there is none to be had.
        """
        ...

    def close(self) -> None:
        """Let go of what is held. Idempotent."""
        ...


class FreshMemory:
    """Allocates when asked, each page at its first touch."""

    def begin(self, model: ModelName, size_bytes: int, free_bytes: int) -> None:
        """Nothing is held."""

    def end(self, model: ModelName, free_bytes: int) -> None:
        """Nothing is held."""

    def fit(self, free_bytes: int) -> None:
        """Nothing is held."""

    def want(self, models: Iterable[Sequence[int]]) -> None:
        """Nothing is held."""

    def allocate(self, _model: ModelName, size_bytes: int) -> PoolFile:
        """Return a new file, none of it allocated yet."""
        return PoolFile(size_bytes)

    def close(self) -> None:
        """Nothing is held."""
