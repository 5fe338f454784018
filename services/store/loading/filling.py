"""A load's memory while it is being filled: who may look at it already, and how that ends."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

from gearfall.core.errors import GearfallError
from gearfall.core.ids import ModelName
from gearfall.infra.memory.native import PoolFile
from services.store.loading.flight import Flight
from services.store.tiers.pool import Resident


@dataclass(slots=True, eq=False)
class Filling:
    """Owned by one attempt of a load; used from the event loop's thread."""

    model: ModelName
    digest: str
    manifest_json: bytes
    partition_fds: tuple[int, ...]
    """To read by, in the order of the manifest's partitions; closed at the end."""
    partition_sizes: tuple[int, ...]
    flight: Flight[tuple[int, ...], Resident] = field(init=False)
    """How many bytes of each partition are verified, from its front on."""
    _holders: list[str] = field(default_factory=list)
    _is_resident: bool = False

    def __post_init__(self) -> None:
        self.flight = Flight((0,) * len(self.partition_sizes))

    @classmethod
    def over(
        cls, model: ModelName, digest: str, manifest_json: bytes, files: Sequence[PoolFile]
    ) -> Self:
        """Return the filling of these files, one a partition; for any thread. Raises OSError."""
        fds: list[int] = []
        try:
            fds.extend(file.open_reader() for file in files)
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise
        sizes = tuple(file.size_bytes for file in files)
        return cls(model, digest, manifest_json, tuple(fds), sizes)

    @property
    def holders(self) -> Sequence[str]:
        """Who holds it, one entry for each lease."""
        return tuple(self._holders)

    @property
    def is_resident(self) -> bool:
        """Whether it has ended as a resident model, and its holders as that model's."""
        return self._is_resident

    def hold(self, holder: str) -> None:
        """Count a holder until `release`."""
        self._holders.append(holder)

    def release(self, holder: str) -> None:
        """End one lease of `holder`."""
        self._holders.remove(holder)

    def advance(self, partition: int, verified_bytes: int) -> None:
        """Say that a partition is verified so far."""
        verified = list(self.flight.progress)
        verified[partition] = verified_bytes
        self.flight.publish(tuple(verified))

    def succeed(self, resident: Resident) -> None:
        """End it: everything is verified and sealed, and the holders lease the resident model."""
        self._is_resident = True
        self.flight.succeed(resident)
        self._close()

    def fail(self, error: GearfallError) -> None:
        """End it: what was handed out is not the model. Idempotent, and nothing after `succeed`."""
        if not self.flight.is_done:
            self.flight.fail(error)
            self._close()

    def _close(self) -> None:
        for fd in self.partition_fds:
            os.close(fd)
        self.partition_fds = ()
