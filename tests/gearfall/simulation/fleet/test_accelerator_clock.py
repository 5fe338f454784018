import pytest

from gearfall.core.ids import WorkerId
from gearfall.simulation.fleet.accelerator_clock import AcceleratorClock

ONE, PAIR = WorkerId("one"), WorkerId("pair")


def test_a_worker_counts_while_it_hosts_anything_by_its_accelerators():
    clock = AcceleratorClock({ONE: 1, PAIR: 2})
    clock.hosts_more(PAIR, 10.0)
    clock.hosts_more(PAIR, 12.0)
    clock.hosts_less(PAIR, 13.0)
    assert clock.used_s(15.0) == pytest.approx(10.0)
    clock.hosts_less(PAIR, 20.0)
    clock.hosts_more(ONE, 30.0)
    assert clock.used_s(33.0) == pytest.approx(20.0 + 3.0)
    clock.hosts_less(ONE, 34.0)
    assert clock.used_s(99.0) == pytest.approx(24.0)


def test_what_is_not_there_can_not_go():
    with pytest.raises(AssertionError, match="hosts nothing"):
        AcceleratorClock({ONE: 1}).hosts_less(ONE, 1.0)
