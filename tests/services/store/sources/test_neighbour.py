"""What a call to a neighbour may end with, and what that means for the load."""

import grpc
import pytest
from grpc.aio import AioRpcError, Metadata

from gearfall.core.errors import CorruptCheckpoint, GearfallError, NotFound, Unavailable
from services.store.sources.neighbour import failure_of


@pytest.mark.parametrize(
    ("status", "means"),
    [
        (grpc.StatusCode.UNAVAILABLE, Unavailable),
        (grpc.StatusCode.INTERNAL, Unavailable),
        (grpc.StatusCode.DEADLINE_EXCEEDED, Unavailable),
        (grpc.StatusCode.NOT_FOUND, NotFound),
        (grpc.StatusCode.DATA_LOSS, CorruptCheckpoint),
    ],
)
def test_one_that_breaks_is_one_that_is_not_there(
    status: grpc.StatusCode, means: type[GearfallError]
) -> None:
    found = failure_of(AioRpcError(status, Metadata(), Metadata(), details="CANCELLED"))
    assert type(found) is means
    assert "CANCELLED" in found.message
