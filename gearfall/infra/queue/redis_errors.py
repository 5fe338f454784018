"""Redis's errors in our tree."""

from redis import exceptions

from gearfall.core.errors import (
    Conflict,
    GearfallError,
    Internal,
    NotFound,
    Overloaded,
    Unavailable,
)

UNREACHABLE = (exceptions.ConnectionError, exceptions.TimeoutError, TimeoutError, OSError)
"""What redis-py and the event loop raise when the server can't be reached in time."""

_NOT_SERVING = ("LOADING", "READONLY", "MISCONF", "CLUSTERDOWN", "MASTERDOWN", "TRYAGAIN", "BUSY ")


def error_from_redis(error: Exception) -> GearfallError:
    """Return the error of our tree for one that redis-py raised.

    A consumer group that is not there, or went away under a blocked read, is NotFound; one that is
    there already is Conflict.
    """
    text = f"redis: {error or type(error).__name__}"
    if isinstance(error, UNREACHABLE) or str(error).startswith(_NOT_SERVING):
        return Unavailable(text, retry_after_s=1.0)
    if isinstance(error, exceptions.OutOfMemoryError):
        return Overloaded(text, retry_after_s=1.0)
    if str(error).startswith(("NOGROUP", "UNBLOCKED")):
        return NotFound(text)
    return Conflict(text) if str(error).startswith("BUSYGROUP") else Internal(text)
