"""The LoRA adapters that a model can compute with: mapped, checked against it, put into its slots.

An adapter's tensors are named as in PEFT's files, `<module>.lora_A.weight`; its modules are found
by the names of the base's own tensors, through the renamings of the base's family.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from mmap import mmap

import torch
from torch import nn

from gearfall.checkpoint.adapter_source import (
    ADAPTER_CONFIG_FILE,
    alpha_of,
    parse_factor_name,
    read_alphas,
)
from gearfall.checkpoint.rank_tensors import rank_tensors
from gearfall.checkpoint.source import decode_object
from gearfall.core.checkpoint.manifest import AdapterFacts, Manifest
from gearfall.core.errors import Conflict, CorruptCheckpoint, InvalidRequest
from services.worker.engine.batching.packing import AdapterRows
from services.worker.engine.model.lora import Factors, LoraSlot, LoraStep, RowGroup
from services.worker.engine.model.modules import StoredEmbedding, StoredLinear
from services.worker.engine.model.ops import Ops

_DTYPES = frozenset({torch.bfloat16, torch.float16, torch.float32})
_Host = StoredLinear | StoredEmbedding


@dataclass(frozen=True, slots=True)
class Network:
    """What an adapter needs to know of the model that it is attached to."""

    module: nn.Module
    head: Callable[[], nn.Module | None]
    """Gives the module that computes logits from hidden states."""
    rename: Callable[[str], str]
    """Turns a stored tensor's name into the model's."""
    base_prefix: str
    """Of the names of the model without its head; adapters may have been trained on either."""


class Adapters:
    """Owner of the adapters attached to one model."""

    def __init__(self, network: Network, ops: Ops, device: torch.device) -> None:
        self.step = LoraStep()
        self._network = network
        self._ops = ops
        self._device = device
        self._attached: dict[str, Mapping[str, Factors]] = {}
        self.on_drop: Callable[[str], None] = lambda _digest: None
        """Called when an adapter is let go of: who else keeps its factors does so too."""

    @property
    def attached(self) -> frozenset[str]:
        """Digests of all that are attached."""
        return frozenset(self._attached)

    def attach(
        self,
        digest: str,
        manifest: Manifest,
        mappings: Sequence[mmap],
        config_json: bytes,
        *,
        base_digest: str,
    ) -> None:
        """Make rows able to ask for the adapter `digest`. One that is attached stays as it is.

        Raises Conflict for another base, InvalidRequest for modules that can't have an adapter,
        CorruptCheckpoint for factors that do not fit; nothing is attached then.
        """
        if digest in self._attached:
            return
        facts = manifest.adapter
        if facts is None:
            raise InvalidRequest("the checkpoint is a model, not a LoRA adapter")
        if facts.base_digest != base_digest:
            raise Conflict("the adapter belongs to other bytes than the model's")
        updates = self._read(manifest, facts, mappings, config_json)
        hosts = self._hosts(updates)
        for name, factors in updates.items():
            _check_fits(name, factors, hosts[name])
        for name, factors in updates.items():
            slot = self._slot_of(hosts[name])
            slot.factors = {**slot.factors, digest: factors}
        self._attached[digest] = updates

    def updates(self, digest: str) -> Mapping[nn.Module, Factors]:
        """Return what an attached adapter adds, by module."""
        module = self._network.module
        attached = self._attached[digest]
        return {module.get_submodule(name): factors for name, factors in attached.items()}

    def begin_step(self, rows: Sequence[AdapterRows]) -> None:
        """Say which rows of the next forward pass run with which adapter."""
        self.step.groups = [
            RowGroup(
                group.adapter,
                torch.from_numpy(group.tokens).to(self._device),
                torch.from_numpy(group.logits).to(self._device),
            )
            for group in rows
        ]

    def end_step(self) -> None:
        """Forget them."""
        self.step.groups = ()

    def drop(self, digest: str) -> None:
        """Let go of an adapter; no row of a later step may ask for it. Idempotent."""
        self.on_drop(digest)
        hosts = self._hosts(self._attached.pop(digest, {}))
        for host in hosts.values():
            slot = self._slot_of(host)
            slot.factors = {name: kept for name, kept in slot.factors.items() if name != digest}
            if not slot.factors:
                host.slot = None

    def check(self) -> None:
        """Assert that slots hold the factors of what is attached, and nothing else."""
        held = [
            (digest, name)
            for name, module in self._network.module.named_modules()
            if isinstance(module, _Host) and module.slot is not None
            for digest in module.slot.factors
        ]
        wanted = [(digest, name) for digest, names in self._attached.items() for name in names]
        assert sorted(held) == sorted(wanted), "an adapter's factors were lost or left behind"

    def _read(
        self,
        manifest: Manifest,
        facts: AdapterFacts,
        mappings: Sequence[mmap],
        config_json: bytes,
    ) -> dict[str, Factors]:
        """Return the adapter's factors by the name of the model's module."""
        halves: defaultdict[tuple[str, str], dict[bool, torch.Tensor]] = defaultdict(dict)
        names = dict(self._network.module.named_modules())
        for tensor_name, tensor in rank_tensors(manifest, mappings, 0, 1).items():
            factor = parse_factor_name(tensor_name)
            if factor is None or tensor.dtype not in _DTYPES or tensor.dim() != 2:
                raise CorruptCheckpoint(f"{tensor_name!r} is no factor of a LoRA adapter")
            module = self._find(factor.module, names)
            halves[module, factor.module][factor.is_a] = tensor.to(self._device)
        alphas = read_alphas(decode_object(ADAPTER_CONFIG_FILE, config_json))
        updates: dict[str, Factors] = {}
        for (module, stored_name), pair in halves.items():
            if module in updates or len(pair) != 2:
                raise CorruptCheckpoint(f"the adapter has no two factors for {stored_name!r}")
            scale = _scale(facts, alpha_of(stored_name, facts.alpha, alphas), pair[True].shape[0])
            updates[module] = Factors(pair[True], pair[False], scale)
        return updates

    def _find(self, stored_name: str, names: Mapping[str, nn.Module]) -> str:
        """Return the name of the model's module that an adapter calls `stored_name`."""
        renamed = self._network.rename(f"{stored_name}.weight").removesuffix(".weight")
        prefix = f"{self._network.base_prefix}."
        for name in (renamed, renamed.removeprefix(prefix), f"{prefix}{renamed}"):
            if name in names:
                return name
        raise InvalidRequest(f"the model has no module {stored_name!r} for the adapter")

    def _hosts(self, modules: Mapping[str, Factors]) -> dict[str, _Host]:
        hosts = {}
        for name in modules:
            module = self._network.module.get_submodule(name)
            if not isinstance(module, _Host):
                kind = type(module).__name__
                raise InvalidRequest(f"{name!r}, a {kind}, can't have an adapter here")
            hosts[name] = module
        return hosts

    def _slot_of(self, host: _Host) -> LoraSlot:
        if host.slot is None:
            host.slot = LoraSlot(self._ops, self.step, is_head=host is self._network.head())
        return host.slot


def _check_fits(name: str, factors: Factors, host: _Host) -> None:
    rank, length = factors.a.shape
    expected = (length, factors.b.shape[0])
    if host.sizes != expected or factors.b.shape[1] != rank or rank == 0:
        raise CorruptCheckpoint(
            f"the adapter's factors {list(factors.a.shape)} and {list(factors.b.shape)} do not fit "
            f"{name!r}, which takes {host.sizes[0]} and gives {host.sizes[1]}"
        )


def _scale(facts: AdapterFacts, alpha: float, rank: int) -> float:
    return alpha / (math.sqrt(rank) if facts.is_rank_stabilised else rank)
