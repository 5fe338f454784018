"""A LoRA adapter in PEFT's layout as the source of a checkpoint, checked against its base.

The directory holds `adapter_config.json` and `adapter_model.safetensors`. Every module's two
factors must fit the base's weight: A is [rank, in], B is [out, rank].
"""

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gearfall.checkpoint.model_facts import main_dtype
from gearfall.checkpoint.source import (
    Source,
    check_directory,
    decode_object,
    open_all,
    read_small_files,
)
from gearfall.checkpoint.tensor_parallel import SplitRules
from gearfall.core.checkpoint.manifest import AdapterFacts, Manifest, TensorEntry
from gearfall.core.checkpoint.manifest_split import Split
from gearfall.core.checkpoint.safetensors_header import SourceTensor
from gearfall.core.errors import InvalidRequest

ADAPTER_CONFIG_FILE = "adapter_config.json"
_ADAPTER_FILE = "adapter_model.safetensors"
_SMALL_FILES_MAX_BYTES = {ADAPTER_CONFIG_FILE: 2**20}
_MAX_RANK = 2**16
_FACTOR = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<factor>[AB])"
    r"(?:\.weight)?"
)
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_.]{1,512}")
_UNSUPPORTED = {
    "use_dora": "DoRA",
    "modules_to_save": "modules saved whole",
    "auto_mapping": "a class of its own",
    "lora_bias": "a bias of its own",
    "layer_replication": "layers that are used twice",
    "target_parameters": "updates of bare parameters",
    "trainable_token_indices": "tokens trained apart",
    "alora_invocation_tokens": "an invocation sequence",
    "use_qalora": "pooled inputs",
}
_KEEPING_BASE = (True, False, None, "gaussian", "orthogonal", "eva")
"""Values of init_lora_weights that leave the base's weights as they are."""


@dataclass(frozen=True, slots=True)
class FactorName:
    """What the name of an adapter's tensor says."""

    module: str
    """As the adapter's base calls it."""
    is_a: bool
    is_embedding: bool


@dataclass(frozen=True, slots=True)
class _Factor:
    """One of a module's two matrices."""

    tensor: SourceTensor
    base: TensorEntry
    is_a: bool
    is_transposed: bool
    """Whether the base stores the module's weight [in, out]."""

    @property
    def inner_dimension(self) -> int:
        """The dimension that the factors share."""
        return 0 if self.is_a else 1

    @property
    def base_dimension(self) -> int:
        """The base weight's dimension that this factor's other one must fit."""
        return 1 if self.is_a != self.is_transposed else 0


def is_adapter(path: Path) -> bool:
    """Whether a directory looks like a LoRA adapter."""
    return (path / ADAPTER_CONFIG_FILE).exists()


@contextlib.contextmanager
def open_adapter(path_text: str, base: Manifest, base_digest: str) -> Iterator[Source]:
    """Check an adapter's directory against its base and hold its file open.

    Raises InvalidRequest for what the caller must change, CorruptCheckpoint for broken files.
    """
    path = check_directory(path_text)
    if base.adapter is not None:
        raise InvalidRequest("the base of an adapter must be a model", param="base")
    with contextlib.ExitStack() as stack:
        small_files = read_small_files(path, _SMALL_FILES_MAX_BYTES)
        if ADAPTER_CONFIG_FILE not in small_files:
            raise InvalidRequest(f"{path} has no {ADAPTER_CONFIG_FILE}", param="path")
        config = decode_object(ADAPTER_CONFIG_FILE, small_files[ADAPTER_CONFIG_FILE])
        adapter = read_adapter_facts(config, base_digest)
        files = open_all(path, [_ADAPTER_FILE], stack)
        tensors = files[0].header.tensors
        if not tensors:
            raise InvalidRequest(f"{_ADAPTER_FILE} holds no tensor", param="path")
        factors = find_factors(tensors, base, is_transposed=bool(config.get("fan_in_fan_out")))
        check_factors(factors)
        parameters = sum(tensor.elements for tensor in tensors)
        facts = replace(base.model, parameters=parameters, dtype=main_dtype(tensors))
        yield Source(
            path=path,
            files=files,
            small_files=small_files,
            facts=facts,
            rules=SplitRules(_splits(factors), ""),
            ties={},
            revision="",
            adapter=adapter,
        )


def read_adapter_facts(config: Mapping[str, Any], base_digest: str) -> AdapterFacts:
    """Return what adapter_config.json says. Raises InvalidRequest for what is not plain LoRA."""
    if config.get("peft_type") != "LORA":
        raise InvalidRequest(f"{ADAPTER_CONFIG_FILE} is not of a LoRA adapter", param="path")
    for field, meaning in _UNSUPPORTED.items():
        if config.get(field):
            raise InvalidRequest(f"an adapter with {meaning} ({field}) is not supported")
    if config.get("init_lora_weights") not in _KEEPING_BASE:
        raise InvalidRequest(
            "an adapter that changed its base (init_lora_weights) is not supported: save it as "
            "plain LoRA",
            param="path",
        )
    if config.get("bias", "none") != "none":
        raise InvalidRequest("an adapter with biases (bias) is not supported", param="path")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or isinstance(rank, bool) or not 0 < rank <= _MAX_RANK:
        raise InvalidRequest(f"{ADAPTER_CONFIG_FILE} has an impossible r", param="path")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not abs(alpha) < 2**31:
        raise InvalidRequest(f"{ADAPTER_CONFIG_FILE} has an impossible lora_alpha", param="path")
    read_alphas(config)
    return AdapterFacts(base_digest, rank, float(alpha), config.get("use_rslora") is True)


def parse_factor_name(name: str) -> FactorName | None:
    """Return what a tensor of an adapter is called by, None for one that is no factor."""
    match = _FACTOR.fullmatch(name)
    if match is None:
        return None
    return FactorName(match["module"], match["factor"] == "A", match["embedding"] is not None)


def read_alphas(config: Mapping[str, Any]) -> Mapping[str, float]:
    """Return the alphas of modules that have one of their own, by the end of the module's name.

    PEFT takes the keys for regular expressions; only plain names are taken here, since an
    expression may run for ever. Raises InvalidRequest.
    """
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, Mapping):
        raise InvalidRequest(f"{ADAPTER_CONFIG_FILE} has an impossible alpha_pattern", param="path")
    for pattern, alpha in patterns.items():
        is_number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
        if not is_number or not abs(alpha) < 2**31 or not _PLAIN_NAME.fullmatch(pattern):
            raise InvalidRequest(
                f"alpha_pattern {pattern[:80]!r} is not a module's name with a number", param="path"
            )
    return {pattern: float(alpha) for pattern, alpha in patterns.items()}


def alpha_of(module: str, usual: float, alphas: Mapping[str, float]) -> float:
    """Return a module's alpha: of the first key that is its name or the end of it from a dot on."""
    found = (
        alpha
        for pattern, alpha in alphas.items()
        if module == pattern or module.endswith(f".{pattern}")
    )
    return next(found, usual)


def find_factors(
    tensors: Sequence[SourceTensor], base: Manifest, *, is_transposed: bool
) -> list[_Factor]:
    """Find the base weight of every factor. Raises InvalidRequest for one that has none."""
    entries = base.entries_by_name()
    factors = []
    for tensor in tensors:
        name = parse_factor_name(tensor.name)
        entry = None if name is None else _find_base(name.module, entries)
        if name is None or entry is None:
            raise InvalidRequest(
                f"the base has no weight for the adapter's tensor {tensor.name!r}", param="path"
            )
        # An embedding's weight is [vocabulary, width]: its input is its first dimension.
        is_base_transposed = is_transposed or name.is_embedding
        factors.append(_Factor(tensor, entry, name.is_a, is_base_transposed))
    return factors


def check_factors(factors: Sequence[_Factor]) -> None:
    """Raise InvalidRequest unless every module has two factors that fit it and each other."""
    inner: dict[str, dict[bool, int]] = {}
    for factor in factors:
        shape, expected = factor.tensor.shape, factor.base.full_shape
        if len(shape) != 2 or len(expected) != 2:
            raise InvalidRequest(f"{factor.tensor.name!r} is not a matrix over a matrix")
        if shape[1 - factor.inner_dimension] != expected[factor.base_dimension]:
            raise InvalidRequest(
                f"{factor.tensor.name!r} of shape {list(shape)} does not fit the base's "
                f"{factor.base.name!r} of shape {list(expected)}",
                param="path",
            )
        inner.setdefault(factor.base.name, {})[factor.is_a] = shape[factor.inner_dimension]
    for name, lengths in inner.items():
        if len(lengths) != 2 or lengths[True] != lengths[False]:
            raise InvalidRequest(f"the adapter's factors for {name!r} don't fit each other")


def _find_base(module: str, entries: Mapping[str, Sequence[TensorEntry]]) -> TensorEntry | None:
    """Look a module's weight up, also where base or adapter name the inner model and one not."""
    shorter = module.partition(".")[2]
    names = (module, shorter, f"model.{module}", f"transformer.{module}")
    found = (entries.get(f"{name}.weight") for name in names)
    return next((candidates[0] for candidates in found if candidates), None)


def _splits(factors: Sequence[_Factor]) -> dict[str, Split]:
    """A factor is shared as the base weight's dimension that it fits; the inner one never is."""
    return {
        factor.tensor.name: Split(1 - factor.inner_dimension, factor.base.split.sections)
        for factor in factors
        if factor.base.split is not None and factor.base.split.dimension == factor.base_dimension
    }
