"""This node's part of the ModelRecords: merged by compare-and-set, so that nodes don't race."""

import contextlib
import logging
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from gearfall.core.errors import Conflict, Overloaded, Unavailable
from gearfall.core.ids import ModelName, NodeId
from gearfall.core.records import ModelRecord
from gearfall.infra.state.cluster import Cluster
from gearfall.infra.state.cluster_keys import INCARNATION_KEY, decode_entry, encode_record, key_of
from services.store.models.ledger import Ledger
from services.store.tiers.stored_model import StoredModel

_MAX_ATTEMPTS = 16
_MODELS = "models/"
"""Below it lie the records of all models."""
REVISIONS_BETWEEN_NOTES = 100
"""A note waits for the disk."""
_log = logging.getLogger(__name__)

_Change = Callable[[ModelRecord | None], ModelRecord | None]


class ModelRegistry:
    """Adds and removes this node in the records of models."""

    def __init__(self, cluster: Cluster, node_id: NodeId, ledger: Ledger) -> None:
        self._cluster = cluster
        self._node_id = node_id
        self._ledger = ledger
        self._refused: set[tuple[ModelName, str]] = set()
        self._losses = cluster.view.losses
        self._is_life_noted = False
        """Whether the ledger was compared with state since the start, or since its last loss."""
        self._forgotten = 0

    async def publish(self, stored: StoredModel) -> ModelRecord:
        """Say that this node holds a model, creating its record if there is none.

        Raises Conflict when other nodes hold other bytes under that name, Unavailable when state
        can't be reached.
        """
        name, node = stored.name, self._node_id

        def add(known: ModelRecord | None) -> ModelRecord:
            others = () if known is None else tuple(n for n in known.nodes if n != node)
            if known is not None and others and known.digest != stored.digest:
                raise Conflict(
                    f"model {name!r} is registered with other bytes on {', '.join(others[:4])}: "
                    "remove it first",
                    param="name",
                )
            fresh = record_of(stored, tuple(sorted({*others, node})))
            same_bytes = known is not None and known.digest == stored.digest
            if known is None or not same_bytes:
                return fresh
            return replace(fresh, source=known.source, is_removing=known.is_removing)

        incarnation = await self._incarnation()
        record, revision = await self._update(name, add)
        assert record is not None
        self._note(incarnation, {name: stored.digest}, revision)
        return record

    async def withdraw(self, name: ModelName, *, forget: bool) -> bool:
        """Say that this node holds a model no longer; return whether there was a record.

        `forget` deletes the record when no node is left: the model was removed, not only lost.
        """

        def remove(known: ModelRecord | None) -> ModelRecord | None:
            if known is None:
                return None
            return replace(known, nodes=tuple(n for n in known.nodes if n != self._node_id))

        record, _ = await self._update(name, remove)
        if record is not None and not record.nodes and forget:
            await self._cluster.delete_model(name)
        return record is not None

    async def give_up(self, name: ModelName) -> bool:
        """Say that this node holds a model no longer, if another live node still does.

        One write decides, so that two nodes can't both count on each other's copy.
        """

        def leave(known: ModelRecord | None) -> ModelRecord | None:
            if known is None or not self.others(known):
                return known
            return replace(known, nodes=tuple(n for n in known.nodes if n != self._node_id))

        record, _ = await self._update(name, leave)
        return record is not None and self._node_id not in record.nodes

    def others(self, record: ModelRecord) -> Sequence[NodeId]:
        """Other live nodes that have a model."""
        live = self._cluster.view.nodes
        return tuple(node for node in record.nodes if node != self._node_id and node in live)

    async def reconcile(self, stored: dict[ModelName, StoredModel]) -> Sequence[ModelName]:
        """Make the records tell the truth about this node: after a start, or a loss of state.

        Returns the models that were removed from the cluster while this node did not listen: they
        are not published again. Raises Unavailable. A conflict is logged once and left: somebody
        must remove one of the two.
        """
        removed = []
        view = self._cluster.view
        models = view.models
        if self._losses != view.losses:
            self._is_life_noted = False
            await self._name_new_life()
            self._losses = view.losses
        for name, record in models.items():
            if self._node_id in record.nodes and name not in stored:
                await self.withdraw(name, forget=False)
        for name, model in stored.items():
            known = models.get(name)
            is_listed = known is not None and self._node_id in known.nodes
            if known is None and await self._is_removed(model):
                removed.append(name)
            elif known is None or not is_listed or known.digest != model.digest:
                await self._publish_found(model)
        await self._note_listed(models, stored)
        return removed

    def forget(self, name: ModelName) -> None:
        """Note that a model is no longer here, so that it may come again."""
        self._forgotten += 1
        self._ledger.remove(name)

    def note_seen(self, *, after: int = REVISIONS_BETWEEN_NOTES) -> None:
        """Note how far cluster state has come, if by `after` revisions or more since the last note.

        A state that is found behind that went back: a backup was restored.
        """
        ledger, revision = self._ledger, self._cluster.revision
        if not self._is_life_noted or revision < ledger.revision + after:
            return
        if self._cluster.view.losses == self._losses:
            self._note(ledger.incarnation, {}, revision)

    async def _note_listed(
        self, models: Mapping[ModelName, ModelRecord], stored: Mapping[ModelName, StoredModel]
    ) -> None:
        """Note what state lists of this node, whoever wrote it and in whichever life.

        Else a model that was in a backup, or whose ledger is lost, comes back after its removal.
        """
        life, listed = self._ledger.incarnation, self._listed(models, stored)
        if self._is_life_noted and all(
            self._ledger.has(life, name, digest) for name, digest in listed.items()
        ):
            self.note_seen()
            return
        forgotten = self._forgotten
        # In this order, and not from the view: what is listed then is of this life or a later one.
        incarnation = await self._incarnation()
        found = await self._cluster.state.list(_MODELS)
        if incarnation == life and found.revision < self._ledger.revision:
            await self._name_new_life()
            await self._note_listed(models, stored)
            return
        records = [_decode(entry.key, entry.value) for entry in found.entries]
        known = {record.name: record for record in records if record is not None}
        if forgotten == self._forgotten:
            self._note(incarnation, self._listed(known, stored), found.revision)
            self._is_life_noted = True

    def _listed(
        self, models: Mapping[ModelName, ModelRecord], stored: Mapping[ModelName, StoredModel]
    ) -> dict[ModelName, str]:
        return {
            name: model.digest
            for name, model in stored.items()
            if (known := models.get(name)) is not None
            and self._node_id in known.nodes
            and known.digest == model.digest
        }

    def _note(self, incarnation: str, digests: Mapping[ModelName, str], revision: int) -> None:
        try:
            self._ledger.note(incarnation, digests, revision)
        except (Overloaded, Unavailable) as error:
            # What is published is true all the same: a node with a full disk has what it has.
            _log.warning("cluster state not noted", extra={"error": error.message})

    async def _is_removed(self, model: StoredModel) -> bool:
        # In this order: a registration under way writes the record first, then the ledger.
        if not self._ledger.has(await self._incarnation(), model.name, model.digest):
            return False
        # The view may be behind a registration: only state itself says that a model is gone.
        key = key_of("models", model.name)
        if await self._cluster.state.get(key) is not None:
            return False
        if (await self._cluster.state.list(key)).revision < self._ledger.revision:
            await self._name_new_life()
            return False
        return True

    async def _name_new_life(self) -> None:
        """Cluster state was restored from a backup: what it lacks was not removed.

        Its old life's name would say so to every store that comes later.
        """
        entry = await self._cluster.state.get(INCARNATION_KEY)
        if entry is not None and entry.value == self._ledger.incarnation.encode():
            _log.warning("cluster state went back: what it lacks is published again")
            with contextlib.suppress(Conflict):
                await self._cluster.state.compare_and_set(
                    INCARNATION_KEY,
                    uuid.uuid4().hex.encode(),
                    expected_mod_revision=entry.mod_revision,
                )

    async def _incarnation(self) -> str:
        """Return what names this life of cluster state; the first who asks names it."""
        state = self._cluster.state
        for _ in range(_MAX_ATTEMPTS):
            entry = await state.get(INCARNATION_KEY)
            if entry is not None:
                return entry.value.decode("ascii", "replace")
            name = uuid.uuid4().hex
            with contextlib.suppress(Conflict):
                await state.compare_and_set(INCARNATION_KEY, name.encode(), expected_mod_revision=0)
                return name
        raise Unavailable("cluster state does not keep its incarnation", retry_after_s=1.0)

    async def _publish_found(self, model: StoredModel) -> None:
        try:
            await self.publish(model)
        except Conflict as error:
            if (model.name, model.digest) not in self._refused:
                self._refused.add((model.name, model.digest))
                _log.warning(
                    "model not published", extra={"model": model.name, "error": error.message}
                )

    async def _update(self, name: ModelName, change: _Change) -> tuple[ModelRecord | None, int]:
        """Read, change, write if nobody wrote meanwhile; again if somebody did.

        Return what stands then and its revision, 0 for nothing.
        """
        state, key = self._cluster.state, key_of("models", name)
        for _ in range(_MAX_ATTEMPTS):
            entry = await state.get(key)
            known = None if entry is None else _decode(key, entry.value)
            changed = change(known)
            revision = 0 if entry is None else entry.mod_revision
            if changed is None or changed == known:
                return changed, revision
            try:
                written = await state.compare_and_set(
                    key, encode_record(changed), expected_mod_revision=revision
                )
            except Conflict:
                continue
            return changed, written
        raise Unavailable(f"the record of model {name!r} is contended", retry_after_s=1.0)


def record_of(stored: StoredModel, nodes: tuple[NodeId, ...]) -> ModelRecord:
    """Return the record that describes a stored model."""
    facts = stored.manifest.model
    return ModelRecord(
        name=stored.name,
        digest=stored.digest,
        architecture=facts.architecture,
        parameters=facts.parameters,
        size_bytes=stored.manifest.size_bytes,
        context_tokens=facts.context_tokens,
        vocabulary_size=facts.vocabulary_size,
        bos_token_id=facts.bos_token_id,
        eos_token_ids=facts.eos_token_ids,
        source=stored.source,
        nodes=nodes,
        dtype=facts.dtype,
        layers=facts.layers,
        kv_bytes_per_token=facts.kv_bytes_per_token(),
        has_chat_template=facts.has_chat_template,
        files=tuple(file.name for file in stored.manifest.files),
        base=stored.base,
        base_digest=stored.manifest.adapter.base_digest if stored.manifest.adapter else "",
    )


def _decode(key: str, value: bytes) -> ModelRecord | None:
    """Return the record; one that does not decode is replaced like an absent one."""
    try:
        record = decode_entry(key, value)[2]
    except ValueError:
        return None
    return record if isinstance(record, ModelRecord) else None
