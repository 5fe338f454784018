"""A model furnished with its weights unit by unit, each when its bytes are verified.

A unit is a layer of a model, or a module outside the layers that has weights. Until its bytes are
there a gate stands in its place: the first forward pass waits at each gate, furnishes what is
behind it and puts it in the gate's place, so that a model computes while it is still being loaded.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from services.worker.engine.model.modules import replace_modules
from services.worker.engine.model.ops import Ops
from services.worker.engine.model.weights import Slot, StoredTensors


class Arrival(Protocol):
    """Bytes that are still being loaded."""

    def wait(self, ends_bytes: Mapping[int, int]) -> None:
        """Return when each of these partitions is verified up to the byte that is named.

        Raises GearfallError when the load failed.
        """
        ...


class Unit:
    """A module, where it stands in the model, and the stored tensors below it."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.places: list[tuple[nn.Module, str]] = []
        self.slots: list[Slot] = []

    def put(self, module: nn.Module) -> None:
        """Have `module` stand in all places."""
        for parent, name in self.places:
            parent._modules[name] = module  # noqa: SLF001 (setattr looks for parameters first)


class Gate(nn.Module):
    """Stands for a unit until its first call. Other attributes are those of the unit's module."""

    def __init__(self, unit: Unit, furnishing: "Furnishing") -> None:
        super().__init__()
        self.__dict__["_unit"] = unit
        self.__dict__["_furnishing"] = furnishing

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_unit"].module, name)

    def forward(self, *arguments: Any, **named: Any) -> Any:
        """Furnish the unit and call it."""
        return self.__dict__["_furnishing"].furnish(self.__dict__["_unit"])(*arguments, **named)


class Furnishing:
    """Puts stored tensors into a model's units and stand-ins into the place of its modules."""

    def __init__(
        self,
        model: nn.Module,
        slots: Sequence[Slot],
        stored: StoredTensors,
        *,
        ops: Ops,
        device: torch.device,
        arrival: Arrival | None = None,
    ) -> None:
        """`arrival` is None for a model whose bytes are all there."""
        self._stored = stored
        self._ops = ops
        self._device = device
        self._arrival = arrival
        self._model = model
        self._slots: dict[int, list[Slot]] = {}
        for slot in slots:
            self._slots.setdefault(id(slot.owner), []).append(slot)
        self._units = self._find_units()

    def begin(self) -> None:
        """Set gates before the units that have bytes to wait for, furnish everything else."""
        self._fill_root()
        for unit in list(self._units.values()):
            if self._arrival is None or not unit.slots:
                self.furnish(unit)
            else:
                unit.put(Gate(unit, self))

    def furnish(self, unit: Unit) -> nn.Module:
        """Fill a unit, once its bytes are verified, and return what stands in its place now."""
        if self._units.pop(id(unit.module), None) is None:
            return unit.module
        self._fill(unit.slots)
        for module in _modules(unit.module):
            self._place_buffers(module)
        holder = nn.Module()
        holder.add_module("unit", unit.module)
        replace_modules(holder, self._ops)
        unit.module = holder.get_submodule("unit")
        unit.put(unit.module)
        return unit.module

    def finish(self) -> None:
        """Furnish what no forward pass has called."""
        for unit in list(self._units.values()):
            self.furnish(unit)

    def _fill_root(self) -> None:
        """Fill what the model has beside its units, in float32 as all that is not replaced."""
        slots = self._slots.get(id(self._model), [])
        self._fill(slots)
        for slot in slots:
            if slot.buffer_dtype is None:
                parameter = getattr(slot.owner, slot.name)
                setattr(slot.owner, slot.name, nn.Parameter(parameter.float(), requires_grad=False))
        self._place_buffers(self._model)

    def _fill(self, slots: Sequence[Slot]) -> None:
        if self._arrival is not None and slots:
            self._arrival.wait(_ends_bytes(slots))
        for slot in slots:
            slot.fill(self._stored)

    def _place_buffers(self, module: nn.Module) -> None:
        for name, buffer in module._buffers.items():  # noqa: SLF001
            if buffer is not None:
                setattr(module, name, buffer.to(self._device))

    def _find_units(self) -> dict[int, Unit]:
        units: dict[int, Unit] = {}
        for parent, name, module in _below(self._model):
            unit = units.setdefault(id(module), Unit(module))
            unit.places.append((parent, name))
        for unit in units.values():
            for module in _modules(unit.module):
                unit.slots += self._slots.get(id(module), ())
        return units


def _below(module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Yield the units below `module` with their places."""
    for name, child in module._modules.items():  # noqa: SLF001
        if child is None:
            continue
        is_unit = isinstance(module, nn.ModuleList) or not child._modules or _has_own(child)  # noqa: SLF001
        if is_unit:
            yield module, name, child
        else:
            yield from _below(child)


def _modules(top: nn.Module) -> list[nn.Module]:
    """Return `top` and all modules below it, without nn.Module's generator for every level."""
    found = [top]
    for module in found:
        found += [child for child in module._modules.values() if child is not None]  # noqa: SLF001
    return found


def _has_own(module: nn.Module) -> bool:
    """Whether a module has parameters or buffers beside its children's."""
    return bool(module._parameters or module._buffers)  # noqa: SLF001


def _ends_bytes(slots: Sequence[Slot]) -> dict[int, int]:
    """Where the bytes of `slots` end, by partition."""
    ends: dict[int, int] = {}
    for slot in slots:
        for piece in slot.plan.pieces:
            end = piece.offset_bytes + (slot.plan.rows - 1) * piece.stride_bytes + piece.size_bytes
            ends[piece.partition] = max(ends.get(piece.partition, 0), end)
    return ends
