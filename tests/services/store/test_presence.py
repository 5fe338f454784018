"""A store notes how far cluster state has come, so that it knows one that went back."""

import json
from pathlib import Path

from gearfall.core.records import LearnedRecord
from gearfall.infra.state.cluster_keys import encode_record
from services.store.models.model_registry import REVISIONS_BETWEEN_NOTES
from tests.services.store.stores import running_store

LEARNED = encode_record(LearnedRecord("other", 0.0, "{}"))


async def test_a_store_notes_how_far_state_has_come_while_it_runs_and_as_it_stops(tmp_path: Path):
    async with running_store(tmp_path) as store:
        server, begun = store.state.server, noted(tmp_path)
        assert begun > 0

        def is_far() -> bool:
            server.put("learned/other", LEARNED, 0)
            return noted(tmp_path) >= begun + REVISIONS_BETWEEN_NOTES

        await store.wait_until(is_far)
        last = server.put("learned/other", LEARNED, 0)
        await store.cluster.wait_seen(last)
    assert noted(tmp_path) >= last


def noted(path: Path) -> int:
    revision = json.loads((path / "published.json").read_bytes())["revision"]
    assert isinstance(revision, int)
    return revision
