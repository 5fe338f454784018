"""Stored tensors as zero-copy views over mapped partitions, and the places they have in a model."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    get_model_conversion_mapping,
)
from transformers.core_model_loading import WeightRenaming

from gearfall.checkpoint.rank_tensors import Memory, open_tensor
from gearfall.checkpoint.reshard import TensorPlan, plan_rank
from gearfall.core.checkpoint.manifest import Manifest
from gearfall.core.errors import CorruptCheckpoint, InvalidRequest

_WEIGHT_DTYPES = ("bfloat16", "float16", "float32")
_IGNORED = (r"rotary_emb\.inv_freq$", r"(^|\.)attn\.(masked_)?bias$")
"""Buffers that old checkpoints hold and today's models compute."""


class StoredTensors:
    """The tensors of one checkpoint by name: views, but for what is gathered from several ranks."""

    def __init__(
        self,
        manifest: Manifest,
        partitions: Sequence[Memory],
        device: torch.device,
        rename: Callable[[str], str],
    ) -> None:
        """`rename` turns a stored name into the model's."""
        self._plans = {rename(name): plan for name, plan in plan_rank(manifest, 0, 1).items()}
        self._partitions = partitions
        self._device = device
        self._opened: dict[TensorPlan, torch.Tensor] = {}
        self._used: set[str] = set()

    def find(self, names: Sequence[str]) -> torch.Tensor | None:
        """Return the tensor of the first name that is stored; the others count as used too."""
        plan = self.match(names)
        return None if plan is None else self.open(plan)

    def match(self, names: Sequence[str]) -> TensorPlan | None:
        """Return the plan of the first name that is stored; no byte of it is read.

        The others count as used too. Raises InvalidRequest for a dtype that is not served.
        """
        found = None
        for name in names:
            plan = self._plans.get(name)
            if plan is not None:
                self._used.add(name)
                if plan.dtype not in _WEIGHT_DTYPES:
                    allowed = " or ".join(_WEIGHT_DTYPES)
                    raise InvalidRequest(f"tensor {name!r} is {plan.dtype}, not {allowed}")
                found = found or plan
        return found

    def open(self, plan: TensorPlan) -> torch.Tensor:
        """Return the tensor of a plan, each time the same; a copy only where it must be one."""
        tensor = self._opened.get(plan)
        if tensor is None:
            tensor = self._opened[plan] = open_tensor(plan, self._partitions).to(self._device)
        return tensor

    def unused(self) -> list[str]:
        """Names that nobody asked for."""
        return sorted(self._plans.keys() - self._used)


@dataclass(frozen=True, slots=True)
class Slot:
    """A place in a model for a stored tensor: a parameter, or a buffer of its own dtype."""

    owner: nn.Module
    name: str
    plan: TensorPlan
    buffer_dtype: torch.dtype | None = None

    def fill(self, stored: StoredTensors) -> None:
        """Put the tensor in its place."""
        tensor = stored.open(self.plan)
        if self.buffer_dtype is None:
            # Past nn.Module.__setattr__, whose checks cost more than all the rest.
            parameter = nn.Parameter(tensor, requires_grad=False)
            self.owner._parameters[self.name] = parameter  # noqa: SLF001
        else:
            setattr(self.owner, self.name, tensor.to(self.buffer_dtype))


def warm_renamings() -> None:
    """Compile transformers' table of renamings, which takes longer than building a small model."""
    get_checkpoint_conversion_mapping("legacy")


def renaming(model: PreTrainedModel) -> Callable[[str], str]:
    """Return how transformers renames stored tensors of this family.

    The function raises InvalidRequest for a tensor that would also have to be computed anew, as
    experts that are stored apart and used fused.
    """
    transforms = get_model_conversion_mapping(model)

    def rename(stored_name: str) -> str:
        name = stored_name
        for transform in transforms:
            name, pattern = transform.rename_source_key(name)
            if pattern is not None and not isinstance(transform, WeightRenaming):
                raise InvalidRequest(f"{stored_name!r} is stored in a form that is not served")
        return name

    return rename


def match_weights(model: PreTrainedModel, stored: StoredTensors) -> list[Slot]:
    """Find the stored tensor of every parameter of `model`, tied ones' the same; read none.

    Raises CorruptCheckpoint when one is missing, has another shape, or is not the model's.
    """
    tied = _tied_names(model)
    slots = []
    for module_name, module in model.named_modules():
        for name, parameter in module._parameters.items():  # noqa: SLF001
            if parameter is None:
                continue
            full_name = f"{module_name}.{name}" if module_name else name
            plan = stored.match(_spellings(full_name, tied, model.base_model_prefix))
            if plan is None:
                raise CorruptCheckpoint(f"the checkpoint lacks the parameter {full_name!r}")
            _check_shape(full_name, plan, parameter)
            slots.append(Slot(module, name, plan))
    for full_name, buffer in model.named_buffers():
        plan = stored.match(_spellings(full_name, tied, model.base_model_prefix))
        if plan is not None and not _is_ignored(model, full_name):
            _check_shape(full_name, plan, buffer)
            owner, _, name = full_name.rpartition(".")
            slots.append(Slot(model.get_submodule(owner), name, plan, buffer.dtype))
    _refuse_strangers(model, stored)
    return slots


def _tied_names(model: PreTrainedModel) -> Mapping[str, Sequence[str]]:
    """For each tied parameter the other names under which its bytes may be stored."""
    groups: dict[str, set[str]] = {}
    for target, source in model.all_tied_weights_keys.items():
        groups.setdefault(source, {source}).add(target)
    return {name: sorted(group - {name}) for group in groups.values() for name in group}


def _spellings(
    full_name: str, tied: Mapping[str, Sequence[str]], base_prefix: str
) -> Sequence[str]:
    """Names to look a parameter up by: its own, with and without the base model's, its twins'."""
    names = []
    for name in (full_name, *tied.get(full_name, ())):
        names.append(name)
        if base_prefix:
            names.append(name.removeprefix(f"{base_prefix}."))
    return list(dict.fromkeys(names))


def _check_shape(name: str, plan: TensorPlan, expected: torch.Tensor) -> None:
    if plan.shape != tuple(expected.shape):
        raise CorruptCheckpoint(
            f"{name!r} has shape {plan.shape}, the model's is {tuple(expected.shape)}"
        )


def _is_ignored(model: PreTrainedModel, name: str) -> bool:
    patterns = [*_IGNORED, *(model._keys_to_ignore_on_load_unexpected or ())]  # noqa: SLF001
    return any(re.search(pattern, name) for pattern in patterns)


def _refuse_strangers(model: PreTrainedModel, stored: StoredTensors) -> None:
    strangers = [name for name in stored.unused() if not _is_ignored(model, name)]
    if strangers:
        shown = ", ".join(strangers[:4])
        raise CorruptCheckpoint(f"the model has no place for {len(strangers)} tensors: {shown}")
