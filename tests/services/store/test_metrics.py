"""What a store counts, seen as Prometheus sees it."""

import asyncio
from pathlib import Path

import pytest

from gearfall.core.errors import CorruptCheckpoint
from gearfall.core.ids import ModelName
from gearfall.core.tiers import Tier
from gearfall.pb import store_pb2 as pb
from services.store.loading.load import LoadEnd, LoadOutcome
from services.store.loading.wishes import WishOutcome
from services.store.metrics import StoreFigures, StoreMetrics
from tests.gearfall.infra.metric_samples import Samples, samples_of
from tests.services.store.checkpoints import many_tensors, write_checkpoint
from tests.services.store.source_directories import write_source
from tests.services.store.stores import RunningStore, running_store

NAME = ModelName("m")


def now(store: RunningStore) -> Samples:
    return samples_of(store.service.render_metrics())


FIGURES = StoreFigures(
    capacity_bytes={Tier.DRAM: 100},
    used_bytes={Tier.DRAM: 40},
    models={Tier.DRAM: 2},
    queued_bytes={Tier.REMOTE: 7},
    bytes_per_s={Tier.REMOTE: 2.5},
    leases=3,
    broken_models=1,
    pending_wishes=5,
)


@pytest.mark.parametrize(
    ("sample", "value"),
    [
        (("gearfall_store_capacity_bytes", "dram"), 100),
        (("gearfall_store_used_bytes", "dram"), 40),
        (("gearfall_store_models", "dram"), 2),
        (("gearfall_store_queued_bytes", "remote"), 7),
        (("gearfall_store_bytes_per_second", "remote"), 2.5),
        (("gearfall_store_leases",), 3),
        (("gearfall_store_broken_models",), 1),
        (("gearfall_store_pending_wishes",), 5),
        (("gearfall_store_wishes_total", "brought"), 1),
        (("gearfall_store_wishes_total", "failed"), 0),
        (("gearfall_store_loads_total", "done", "ssd"), 2),
        (("gearfall_store_loads_total", "corrupt", "remote"), 1),
        (("gearfall_store_loads_total", "failed", "remote"), 0),
        (("gearfall_store_loaded_bytes_total", "ssd"), 30),
        (("gearfall_store_corrupt_found_total", "remote"), 1),
        (("gearfall_store_load_seconds_count", "ssd"), 2),
        (("gearfall_store_load_seconds_bucket", "0.5", "ssd"), 1),
        (("gearfall_store_load_seconds_bucket", "5.0", "ssd"), 2),
    ],
)
def test_what_is_counted_is_rendered(sample, value):
    metrics = StoreMetrics()
    metrics.count_wish(WishOutcome.BROUGHT)
    metrics.count_load(LoadEnd(NAME, Tier.SSD, LoadOutcome.DONE, 10, 0.3))
    metrics.count_load(LoadEnd(NAME, Tier.SSD, LoadOutcome.DONE, 20, 3.0))
    metrics.count_load(LoadEnd(NAME, Tier.REMOTE, LoadOutcome.CORRUPT, 5, 1.0))
    assert samples_of(metrics.render(FIGURES))[sample] == value


async def test_each_load_counts_once_under_the_tier_it_came_from(tmp_path: Path):
    size = write_checkpoint(tmp_path / "far", many_tensors(2)).size_bytes
    async with running_store(tmp_path / "store") as store:
        await store.register("far", (tmp_path / "far").as_uri())
        await store.register("near", write_source(tmp_path / "src"))
        await asyncio.gather(*(store.load("far") for _ in range(5)))
        await store.load("near")
        await store.load("near")
        with await store.lease("near"):
            seen = now(store)
    done = {
        key[2]: n for key, n in seen.items() if key[:2] == ("gearfall_store_loads_total", "done")
    }
    assert done == {"remote": 1, "ssd": 1, "dram": 2}
    assert seen["gearfall_store_loaded_bytes_total", "remote"] == size
    assert seen["gearfall_store_used_bytes", "dram"] > size
    assert seen["gearfall_store_models", "dram"] == 2
    assert seen["gearfall_store_models", "ssd"] == 2
    assert seen["gearfall_store_leases",] == 1
    assert seen["gearfall_store_bytes_per_second", "remote"] > 0
    assert seen["gearfall_store_queued_bytes", "remote"] == 0


async def test_a_flipped_bit_is_counted_and_stays_visible(tmp_path: Path):
    async with running_store(tmp_path / "store") as store:
        await store.register(NAME, write_source(tmp_path / "src"))
        partition = store.service.ssd.get(NAME).directory / "partition-0.bin"
        content = bytearray(partition.read_bytes())
        content[0] ^= 1
        partition.write_bytes(content)
        with pytest.raises(CorruptCheckpoint):
            await store.load(NAME)
        seen = now(store)
        assert seen["gearfall_store_corrupt_found_total", "ssd"] == 1
        assert seen["gearfall_store_loads_total", "corrupt", "ssd"] == 1
        assert seen["gearfall_store_broken_models",] == 1
        await store.call("DeleteModel", pb.DeleteModelRequest(model=NAME))
        assert now(store)["gearfall_store_broken_models",] == 0
