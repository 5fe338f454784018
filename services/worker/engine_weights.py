"""Stored tensors as zero-copy views over mapped partitions, and their way into a model."""

import re
from collections.abc import Callable, Mapping, Sequence
from mmap import mmap

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    get_model_conversion_mapping,
)
from transformers.core_model_loading import WeightRenaming

from gearfall.checkpoint.rank_tensors import open_tensor
from gearfall.checkpoint.reshard import TensorPlan, plan_rank
from gearfall.core.errors import CorruptCheckpoint, InvalidRequest
from gearfall.core.manifest import Manifest

_WEIGHT_DTYPES = ("bfloat16", "float16", "float32")
_IGNORED = (r"rotary_emb\.inv_freq$", r"(^|\.)attn\.(masked_)?bias$")
"""Buffers that old checkpoints hold and today's models compute."""


class StoredTensors:
    """The tensors of one checkpoint by name: views, but for what is gathered from several ranks."""

    def __init__(
        self,
        manifest: Manifest,
        mappings: Sequence[mmap],
        device: torch.device,
        rename: Callable[[str], str],
    ) -> None:
        """`rename` turns a stored name into the model's."""
        self._plans = {rename(name): plan for name, plan in plan_rank(manifest, 0, 1).items()}
        self._mappings = mappings
        self._device = device
        self._opened: dict[TensorPlan, torch.Tensor] = {}
        self._used: set[str] = set()

    def find(self, names: Sequence[str]) -> torch.Tensor | None:
        """Return the tensor of the first name that is stored; the others count as used too."""
        found = None
        for name in names:
            plan = self._plans.get(name)
            if plan is not None:
                self._used.add(name)
                found = self._open(name, plan) if found is None else found
        return found

    def unused(self) -> list[str]:
        """Names that nobody asked for."""
        return sorted(self._plans.keys() - self._used)

    def _open(self, name: str, plan: TensorPlan) -> torch.Tensor:
        if plan.dtype not in _WEIGHT_DTYPES:
            raise InvalidRequest(
                f"tensor {name!r} is {plan.dtype}, not {' or '.join(_WEIGHT_DTYPES)}"
            )
        if plan not in self._opened:
            self._opened[plan] = open_tensor(plan, self._mappings).to(self._device)
        return self._opened[plan]


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


def assign_weights(model: PreTrainedModel, stored: StoredTensors) -> None:
    """Give every parameter of `model` its stored tensor, tied ones the same.

    Raises CorruptCheckpoint when one is missing, has another shape, or is not the model's.
    """
    tied = _tied_names(model)
    for module_name, module in model.named_modules():
        for name, parameter in tuple(module.named_parameters(recurse=False)):
            full_name = f"{module_name}.{name}" if module_name else name
            tensor = stored.find(_spellings(full_name, tied, model.base_model_prefix))
            if tensor is None:
                raise CorruptCheckpoint(f"the checkpoint lacks the parameter {full_name!r}")
            _check_shape(full_name, tensor, parameter)
            setattr(module, name, nn.Parameter(tensor, requires_grad=False))
    for full_name, buffer in tuple(model.named_buffers()):
        tensor = stored.find(_spellings(full_name, tied, model.base_model_prefix))
        if tensor is not None and not _is_ignored(model, full_name):
            _check_shape(full_name, tensor, buffer)
            owner, _, name = full_name.rpartition(".")
            setattr(model.get_submodule(owner), name, tensor.to(buffer.dtype))
    _refuse_strangers(model, stored)


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


def _check_shape(name: str, tensor: torch.Tensor, expected: torch.Tensor) -> None:
    if tensor.shape != expected.shape:
        raise CorruptCheckpoint(
            f"{name!r} has shape {tuple(tensor.shape)}, the model's is {tuple(expected.shape)}"
        )


def _is_ignored(model: PreTrainedModel, name: str) -> bool:
    patterns = [*_IGNORED, *(model._keys_to_ignore_on_load_unexpected or ())]  # noqa: SLF001
    return any(re.search(pattern, name) for pattern in patterns)


def _refuse_strangers(model: PreTrainedModel, stored: StoredTensors) -> None:
    strangers = [name for name in stored.unused() if not _is_ignored(model, name)]
    if strangers:
        shown = ", ".join(strangers[:4])
        raise CorruptCheckpoint(f"the model has no place for {len(strangers)} tensors: {shown}")
