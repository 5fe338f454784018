"""A Hugging Face causal language model over a mapped checkpoint, fed packed steps.

Activations are float32 whatever the stored dtype, so a greedy answer does not hang on the batch it
was computed in. A model that can't be served exactly is refused, never served approximately.
"""

import json
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from gearfall.checkpoint.rank_tensors import Memory
from gearfall.core.checkpoint.manifest import Manifest
from gearfall.core.errors import CorruptCheckpoint, InvalidRequest
from gearfall.core.generation.arithmetic import Arithmetic
from services.worker.engine.batching.packing import PackedStep
from services.worker.engine.kv_memory import EngineKvMemory
from services.worker.engine.model.adapters import Adapters, Network
from services.worker.engine.model.attention import PagedCache
from services.worker.engine.model.decoder import NativePass, find_native_pass
from services.worker.engine.model.ops import NativeOps, Ops, StepLayout
from services.worker.engine.model.side_pass import SidePass
from services.worker.engine.model.units import Arrival, Furnishing
from services.worker.engine.model.weights import StoredTensors, match_weights, renaming

_BATCH_DEPENDENT_ROPES = frozenset({"dynamic", "longrope"})
"""Rotary kinds whose frequencies hang on the longest sequence in the batch."""


class EngineModel:
    """One model and its paged KV cache on one device."""

    def __init__(
        self,
        model: PreTrainedModel,
        cache: PagedCache,
        *,
        device: torch.device,
        vocabulary_size: int,
        has_bf16: bool,
        furnishing: Furnishing,
        adapters: Adapters,
        ops: Ops,
    ) -> None:
        self.adapters = adapters
        """LoRA adapters that rows may ask for."""
        self._model = model
        self._furnishing = furnishing
        self._cache = cache
        self._ops = ops
        self._device = device
        self._has_bf16 = has_bf16
        self._is_first_pass = True
        self.native: NativePass | None = None
        """One call for a whole step, where there is one; known after the first pass."""
        self.vocabulary_size = vocabulary_size

    @property
    def kv_memory(self) -> EngineKvMemory | None:
        """The KV cache's memory after the first pass; None where it can't be shared."""
        return self._cache.memory

    @property
    def kv_bytes(self) -> int:
        """Bytes of the KV cache, known after the first pass."""
        return self._cache.size_bytes

    def use(self, arithmetic: Arithmetic) -> str:
        """Compute so from now on; return the name of what a token's bits hang on.

        A model is exact at first, and in the tokens of a step that are to be so. The name is empty
        on a device that promises no bits. A model without bfloat16 weights is exact whatever is
        asked for.
        """
        if not isinstance(self._ops, NativeOps):
            return ""
        self._ops.arithmetic = arithmetic if self._has_bf16 else Arithmetic.EXACT
        return self._ops.arithmetic.value

    def side_pass(self) -> SidePass | None:
        """Return a pass that runs beside the steps; None where there is none.

        Known after the first pass.
        """
        if self.native is None or self.kv_memory is None:
            return None
        return SidePass(self._another_native, self.kv_memory.touch)

    def _another_native(self) -> NativePass:
        native = find_native_pass(self._model, self._cache.layers, self._ops)
        assert native is not None, "there was one before"
        return native

    def finish(self) -> None:
        """Furnish what no forward pass has called, once its bytes are there.

        Raises InvalidRequest when the model lacks something that is neither stored nor computed.
        """
        self._furnishing.finish()
        _check_complete(self._model)

    @torch.inference_mode()
    def forward(self, step: PackedStep) -> NDArray[np.float32]:
        """Compute one step and return its logits [R, vocabulary], R as in `step.logit_rows`."""
        native = self._native_for(step)
        if native is not None:
            logits = native.logits(step)
        else:
            logits = self._logits(step)[: len(step.logit_rows)]
        rows: NDArray[np.float32] = logits.float().cpu().numpy()
        return rows

    def _native_for(self, step: PackedStep) -> NativePass | None:
        """Return the native pass if it can compute this step."""
        if self.native is None or step.exact_tokens:
            return None
        for group in step.adapters:
            if not self.native.knows(group.adapter):
                self.native.learn(group.adapter, self.adapters.updates(group.adapter))
        return self.native if self.native.can_compute(step) else None

    @torch.inference_mode()
    def reference_logits(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """Return the logits [vocabulary] after `token_ids` by transformers' eager attention."""
        self._model.set_attn_implementation("eager")
        self._keep_exact({len(token_ids): len(token_ids)})
        try:
            ids = torch.tensor([token_ids], device=self._device)
            output = self._model(input_ids=ids, use_cache=False)
        finally:
            self._model.set_attn_implementation(self._cache.name)
            self._keep_exact({})
        logits: NDArray[np.float32] = output.logits[0, -1].float().cpu().numpy()
        return logits

    def _keep_exact(self, rows: Mapping[int, int]) -> None:
        if isinstance(self._ops, NativeOps):
            self._ops.exact_rows = rows

    def _logits(self, step: PackedStep) -> torch.Tensor:
        positions = torch.from_numpy(step.positions)
        layout = StepLayout(
            block_tables=torch.from_numpy(step.block_tables),
            seq_index=torch.from_numpy(step.seq_index),
            positions=positions,
        )
        # A step may want no logits at all: ask for one row then, and drop it.
        rows = step.logit_rows if len(step.logit_rows) else np.zeros(1, dtype=np.int64)
        self._cache.begin_step(layout.to(self._device))
        self.adapters.begin_step(step.adapters)
        wanted = {len(step.token_ids): step.exact_tokens, len(rows): step.exact_logits}
        self._keep_exact(wanted if step.exact_tokens else {})
        output = self._model(
            input_ids=torch.from_numpy(step.token_ids).unsqueeze(0).to(self._device),
            position_ids=positions.long().unsqueeze(0).to(self._device),
            use_cache=False,
            logits_to_keep=torch.from_numpy(rows).to(self._device),
        )
        self._keep_exact({})
        self.adapters.end_step()
        self._cache.end_step()
        if self._is_first_pass:
            self._is_first_pass = False
            self.native = find_native_pass(self._model, self._cache.layers, self._ops)
            if self.native is not None:
                self.adapters.on_drop = self.native.forget
        logits: torch.Tensor = output.logits[0]
        return logits


def build_model(
    manifest: Manifest,
    partitions: Sequence[Memory],
    config_json: bytes,
    *,
    ops: Ops,
    device: torch.device,
    kv_blocks: int,
    arrival: Arrival | None = None,
) -> EngineModel:
    """Build the model that `config_json` describes over the partitions' bytes.

    With an `arrival` the bytes are still being loaded: the first forward pass waits for them, layer
    by layer, and `finish` is to be called after it.

    Raises CorruptCheckpoint when the tensors are not the model's, InvalidRequest when it is of a
    kind that can't be served exactly.
    """
    if manifest.adapter is not None:
        raise InvalidRequest("the checkpoint is a LoRA adapter, not a model")
    config = parse_config(config_json)
    _check_supported(config, manifest.model.architecture)
    cache = PagedCache(ops, total_blocks=kv_blocks, device=device)
    model = _construct(config, cache.name)
    model.eval()
    rename = renaming(model)
    stored = StoredTensors(manifest, partitions, device, rename)
    slots = match_weights(model, stored)
    furnishing = Furnishing(model, slots, stored, ops=ops, device=device, arrival=arrival)
    furnishing.begin()
    network = Network(model, model.get_output_embeddings, rename, model.base_model_prefix)
    built = EngineModel(
        model,
        cache,
        device=device,
        vocabulary_size=manifest.model.vocabulary_size,
        has_bf16=any(tensor.dtype == "bfloat16" for tensor in manifest.tensors),
        furnishing=furnishing,
        adapters=Adapters(network, ops, device),
        ops=ops,
    )
    if arrival is None:
        built.finish()
    return built


def parse_config(config_json: bytes) -> PreTrainedConfig:
    """Return transformers' config. Raises CorruptCheckpoint or InvalidRequest."""
    try:
        content = json.loads(config_json)
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpoint(f"config.json is not JSON: {error}") from None
    kind = content.get("model_type") if isinstance(content, dict) else None
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise InvalidRequest("config.json has no model_type that transformers knows")
    try:
        return CONFIG_MAPPING[kind].from_dict(content)
    except Exception as error:  # config classes raise what they like on bad content
        raise InvalidRequest(f"config.json is not valid: {error}") from error


def _check_supported(config: PreTrainedConfig, architecture: str) -> None:
    expected = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    if architecture != expected:
        raise InvalidRequest(f"{architecture} is not a causal language model; {expected} is")
    if getattr(config, "quantization_config", None):
        raise InvalidRequest("quantised checkpoints are not served")
    if getattr(config, "is_encoder_decoder", False):
        raise InvalidRequest("encoder-decoder models are not served")
    layer_types = set(getattr(config, "layer_types", None) or ())
    if not layer_types <= {"full_attention", "sliding_attention"}:
        raise InvalidRequest(f"layers of the kinds {sorted(layer_types)} are not served")
    ropes = _rope_types(getattr(config, "rope_parameters", None)) & _BATCH_DEPENDENT_ROPES
    if ropes:
        raise InvalidRequest(f"rotary embeddings of the kind {ropes.pop()!r} are not served")


def _rope_types(parameters: object) -> set[str]:
    """Every `rope_type` in a config's rope parameters, nested by layer type or not."""
    if not isinstance(parameters, Mapping):
        return set()
    nested = [_rope_types(value) for value in parameters.values()]
    return {str(parameters.get("rope_type", "default"))}.union(*nested)


class _EmptyOnMeta(TorchFunctionMode):
    """Puts uninitialised tensors on the meta device: parameters cost nothing until assigned.

    Computed tensors, rotary frequencies above all, stay real.
    """

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        arguments = dict(kwargs or {})
        if func is torch.empty:
            arguments["device"] = "meta"
        return func(*args, **arguments)


def _construct(config: PreTrainedConfig, attention: str) -> PreTrainedModel:
    with no_init_weights(), _EmptyOnMeta():
        try:
            model = AutoModelForCausalLM.from_config(
                config, attn_implementation=attention, dtype=torch.float32, trust_remote_code=False
            )
        except KeyError as error:
            raise _own_attention(config.model_type) from error
        except (ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise InvalidRequest(f"transformers can't build this model: {error}") from error
    assert isinstance(model, PreTrainedModel)
    if not model._can_set_attn_implementation():  # noqa: SLF001
        raise _own_attention(config.model_type)
    return model


def _own_attention(kind: str) -> InvalidRequest:
    """Families that choose among attention classes of their own don't know the paged one."""
    return InvalidRequest(f"models of the kind {kind!r} have an attention of their own kind")


def _check_complete(model: PreTrainedModel) -> None:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise InvalidRequest(f"{name!r} is neither stored nor computed by the model's code")
