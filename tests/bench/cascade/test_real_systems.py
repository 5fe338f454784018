"""What the compared systems' plans are asked for."""

import pytest

from bench.cascade.real_systems import DELTA, LOSSES, certified


def test_the_losses_that_are_tried_share_the_chance_of_being_wrong():
    asked = [dict(zip(found[::2], found[1::2], strict=True)) for found in map(certified, LOSSES)]
    assert [each["--loss"] for each in asked] == list(LOSSES)
    assert sum(float(str(each["--delta"])) for each in asked) == pytest.approx(DELTA)
