"""Where an engine process takes adapters in: from descriptors and a manifest to a built model."""

import logging
import os
from collections.abc import Sequence

from gearfall.core.checkpoint.manifest import manifest_digest, parse_manifest
from gearfall.core.errors import CorruptCheckpoint, GearfallError
from gearfall.infra.memory.pool_lease import map_partition
from services.worker.engine.model.adapters import Adapters
from services.worker.engine_link.messages import AttachAdapter

_LOG = logging.getLogger(__name__)


class AdapterDock:
    """Implements `services.worker.engine.batching.adapter_jobs.AdapterHost` for one built model."""

    def __init__(self, adapters: Adapters, base_manifest_json: bytes) -> None:
        self._adapters = adapters
        self._base_digest = manifest_digest(base_manifest_json)

    def attach(self, message: AttachAdapter, descriptors: Sequence[int]) -> None:
        """Map the partitions and attach the adapter; the descriptors are closed in any case.

        Raises GearfallError: whatever is wrong with an adapter must not end the model's engine.
        """
        try:
            self._attach(message, descriptors)
        except GearfallError:
            raise
        except Exception as error:
            _LOG.exception("unexpected error with an adapter", extra={"adapter": message.name})
            raise CorruptCheckpoint(f"it does not load: {type(error).__name__}") from error
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def drop(self, adapter: str) -> None:
        """Let go of an adapter and of its memory."""
        self._adapters.drop(adapter)

    def _attach(self, message: AttachAdapter, descriptors: Sequence[int]) -> None:
        manifest = parse_manifest(message.manifest_json)
        if manifest_digest(message.manifest_json) != message.adapter:
            raise CorruptCheckpoint("its manifest is another one's")
        if len(descriptors) != len(manifest.partitions):
            raise CorruptCheckpoint(f"{len(descriptors)} partitions came, the manifest has others")
        mappings = [
            map_partition(descriptor, partition.size_bytes)
            for descriptor, partition in zip(descriptors, manifest.partitions, strict=True)
        ]
        self._adapters.attach(
            message.adapter,
            manifest,
            mappings,
            message.config_json,
            base_digest=self._base_digest,
        )
