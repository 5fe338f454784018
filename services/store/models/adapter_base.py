"""Which registered model a LoRA adapter belongs to."""

from collections.abc import Callable, Mapping
from pathlib import Path

from gearfall.checkpoint.adapter_source import ADAPTER_CONFIG_FILE, is_adapter
from gearfall.checkpoint.source import CONFIG_FILE, check_directory, decode_object, read_small_files
from gearfall.core.checkpoint.manifest import AdapterFacts
from gearfall.core.errors import Conflict, InvalidRequest, NotFound
from gearfall.core.ids import ModelName
from services.store.tiers.stored_model import StoredModel

_MAX_CONFIG_BYTES = 2**20
Models = Mapping[ModelName, StoredModel]


def base_of_directory(path_text: str, named: str, models: Models) -> StoredModel | None:
    """Return the base of the adapter in a directory, None for a model's directory.

    `named` is what the caller says, else adapter_config.json must name one of `models` by its name
    or by the directory it came from. Raises InvalidRequest, NotFound.
    """
    path = check_directory(path_text)
    if not named and not (is_adapter(path) and not (path / CONFIG_FILE).exists()):
        return None
    if named:
        return _known(named, models)
    files = read_small_files(path, {ADAPTER_CONFIG_FILE: _MAX_CONFIG_BYTES})
    config = decode_object(ADAPTER_CONFIG_FILE, files.get(ADAPTER_CONFIG_FILE, b"{}"))
    told = str(config.get("base_model_name_or_path") or "")
    found = _matching(
        models, lambda model: told in {model.name, model.source} or _is_at(model, told)
    )
    if len(found) != 1:
        raise InvalidRequest(
            f"{path_text} is a LoRA adapter of {told[:200]!r}, which is not the name or directory "
            "of one registered model: say which model is its base",
            param="base",
        )
    return found[0]


def base_of_facts(facts: AdapterFacts, named: str, models: Models) -> StoredModel:
    """Return the base of a converted adapter: the model with its digest, `named` if anything is.

    Raises InvalidRequest, NotFound, or Conflict when the named model has other bytes.
    """
    if named:
        base = _known(named, models)
        if base.digest != facts.base_digest:
            raise Conflict(f"the adapter belongs to other bytes than {named!r}'s", param="base")
        return base
    found = _matching(models, lambda model: model.digest == facts.base_digest)
    if len(found) != 1:
        raise InvalidRequest(
            f"a LoRA adapter of the checkpoint {facts.base_digest}, which is not that of one "
            "registered model: register its base first, or say which it is",
            param="base",
        )
    return found[0]


def _known(named: str, models: Models) -> StoredModel:
    base = models.get(ModelName(named))
    if base is None:
        raise NotFound(f"the base {named[:96]!r} is not registered on this node", param="base")
    if base.manifest.adapter is not None:
        raise InvalidRequest("the base of an adapter must be a model", param="base")
    return base


def _matching(models: Models, holds: Callable[[StoredModel], bool]) -> list[StoredModel]:
    return [model for model in models.values() if not model.manifest.adapter and holds(model)]


def _is_at(model: StoredModel, told: str) -> bool:
    """Whether two spellings of a directory mean the same one."""
    return told.startswith("/") and Path(told).resolve() == Path(model.source)
