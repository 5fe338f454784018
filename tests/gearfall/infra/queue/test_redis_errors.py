"""Redis's errors have a place in our tree."""

import pytest
from redis import exceptions

from gearfall.core.errors import Conflict, Internal, NotFound, Overloaded, Unavailable
from gearfall.infra.queue.redis_errors import error_from_redis


@pytest.mark.parametrize(
    ("raised", "error"),
    [
        (exceptions.ConnectionError("refused"), Unavailable),
        (exceptions.TimeoutError("slow"), Unavailable),
        (exceptions.BusyLoadingError("LOADING"), Unavailable),
        (TimeoutError(), Unavailable),
        (OSError("no route"), Unavailable),
        (exceptions.ResponseError("MISCONF can't persist"), Unavailable),
        (exceptions.ReadOnlyError("READONLY a replica"), Unavailable),
        (exceptions.OutOfMemoryError("OOM"), Overloaded),
        (exceptions.ResponseError("NOGROUP no such group"), NotFound),
        (exceptions.ResponseError("UNBLOCKED the stream is gone"), NotFound),
        (exceptions.ResponseError("BUSYGROUP exists"), Conflict),
        (exceptions.ResponseError("WRONGTYPE not a stream"), Internal),
        (exceptions.DataError("not bytes"), Internal),
    ],
)
def test_errors_of_redis_have_a_place_in_our_tree(raised, error):
    assert type(error_from_redis(raised)) is error
