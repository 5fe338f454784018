"""A socket that could not be connected is left alone for a while; one that nobody tried is not."""

import pytest

from services.worker.migration.cost import DataPath
from services.worker.migration.kv_ways import RETRY_S, KvWays

HERE, THERE = "10.0.0.2:7000", "10.0.0.3:7000"


def test_a_barred_socket_is_tried_again_when_its_time_is_over():
    ways = KvWays()
    assert ways.path_to(HERE, 0.0) is DataPath.KV
    ways.note(HERE, DataPath.KV, DataPath.KV_STREAM, 100.0)
    assert ways.path_to(HERE, 100.0 + RETRY_S - 1) is DataPath.KV_STREAM
    assert ways.path_to(THERE, 101.0) is DataPath.KV
    assert ways.path_to(HERE, 100.0 + RETRY_S) is DataPath.KV


@pytest.mark.parametrize(
    ("tried", "taken"),
    [
        (DataPath.KV, DataPath.KV),
        (DataPath.KV_STREAM, DataPath.KV_STREAM),
        (DataPath.TOKENS, DataPath.TOKENS),
    ],
)
def test_a_stream_that_was_asked_for_bars_no_socket(tried, taken):
    ways = KvWays()
    ways.note(HERE, tried, taken, 100.0)
    assert ways.path_to(HERE, 100.0) is DataPath.KV
