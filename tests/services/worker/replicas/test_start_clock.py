import pytest

from gearfall.core.start_timeline import StartTimeline
from gearfall.core.tiers import Tier
from services.worker.engine_link.messages import EngineReady
from services.worker.replicas.start_clock import StartClock


def test_phases_are_measured_one_after_the_other():
    clock = StartClock(asked_s=10.0)
    clock.begin_load(10.5)
    clock.end_load(13.0, StartTimeline(ssd_s=2.4, from_tier=Tier.REMOTE))
    clock.end_attach(13.1)
    clock.begin_process(13.2)
    clock.end_process(13.25)
    timeline = clock.finish(
        14.0, EngineReady(1, attach_s=0.01, build_s=0.3, first_token_s=0.2, kv_bytes=0)
    )
    assert timeline.queued_s == pytest.approx(0.5)
    assert (timeline.ssd_s, timeline.from_tier) == (2.4, Tier.REMOTE)
    assert timeline.attach_s == pytest.approx(0.11)
    assert timeline.prepare_s == pytest.approx(0.1)
    assert timeline.process_s == pytest.approx(0.05)
    assert (timeline.build_s, timeline.first_token_s) == (0.3, 0.2)
    assert timeline.total_s == pytest.approx(4.0)


def test_what_ran_beside_the_load_is_not_counted_twice():
    clock = StartClock(asked_s=10.0)
    clock.begin_load(10.5)
    clock.end_attach(10.6)  # on memory that is being filled
    clock.begin_process(10.7)
    clock.end_process(10.8)
    clock.end_load(13.0, StartTimeline(ssd_s=2.4))
    timeline = clock.finish(
        13.25, EngineReady(1, attach_s=0.01, build_s=0.3, first_token_s=2.0, kv_bytes=0)
    )
    assert (timeline.attach_s, timeline.prepare_s, timeline.process_s) == (0.0, 0.0, 0.0)
    assert timeline.build_s == 0.0
    assert timeline.first_token_s == pytest.approx(0.25)
    assert timeline.total_s == pytest.approx(3.25)
    assert sum(spent for _, spent in timeline.phases()) == pytest.approx(3.25)


def test_a_load_that_ends_while_the_engine_is_built_leaves_the_rest_of_the_build():
    clock = StartClock(asked_s=10.0)
    clock.begin_load(10.0)
    clock.end_attach(10.1)
    clock.begin_process(10.1)
    clock.end_process(10.2)
    clock.end_load(10.5, StartTimeline(ssd_s=0.4))
    timeline = clock.finish(
        11.0, EngineReady(1, attach_s=0.1, build_s=0.4, first_token_s=0.3, kv_bytes=0)
    )
    assert timeline.build_s == pytest.approx(0.2)
    assert timeline.first_token_s == pytest.approx(0.3)
    assert timeline.attach_s == 0.0


def test_the_way_of_the_stores_first_word_is_not_counted_beside_its_load():
    clock = StartClock(asked_s=10.0)
    clock.begin_load(10.5)
    clock.end_load(13.0, StartTimeline(ssd_s=2.6, total_s=2.625))
    timeline = clock.finish(
        13.0, EngineReady(1, attach_s=0, build_s=0, first_token_s=0, kv_bytes=0)
    )
    assert timeline.queued_s == pytest.approx(0.375)
    assert sum(spent for _, spent in timeline.phases()) == pytest.approx(3.0)
