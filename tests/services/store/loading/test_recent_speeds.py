"""The speed of a tier is the median of its newest loads, of which small ones say nothing."""

import pytest

from gearfall.core.tiers import Tier
from services.store.loading.recent_speeds import RecentSpeeds

MIB = 2**20


@pytest.fixture
def speeds() -> RecentSpeeds:
    return RecentSpeeds((Tier.REMOTE, Tier.SSD))


def test_unknown_before_the_first_load(speeds: RecentSpeeds):
    speeds.note(Tier.SSD, MIB - 1, 1.0)
    assert speeds.of(Tier.SSD) == 0.0


def test_the_median_of_the_newest_eight(speeds: RecentSpeeds):
    for _ in range(8):
        speeds.note(Tier.SSD, MIB, 1.0)
    for megabytes in (9, 2, 4, 3):
        speeds.note(Tier.SSD, megabytes * MIB, 1.0)
    assert speeds.of(Tier.SSD) == 1.5 * MIB
    assert speeds.of(Tier.REMOTE) == 0.0


def test_a_load_that_took_no_time_is_no_error(speeds: RecentSpeeds):
    speeds.note(Tier.REMOTE, MIB, 0.0)
    assert speeds.of(Tier.REMOTE) > MIB
