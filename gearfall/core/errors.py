"""The one error tree of gearfall.

    GearfallError
    ├── InvalidRequest        the caller must change the request
    ├── Unauthenticated       no or unknown credentials
    ├── PermissionDenied      known caller, not allowed
    ├── NotFound              no such model, deployment, request or key
    ├── Conflict              a compare-and-set lost, a name is taken, a thing is in use
    ├── Overloaded            a limit or quota is reached; retry after `retry_after_s`
    ├── DeadlineExceeded      the caller's deadline passed
    ├── Unavailable           a part is down; retry after `retry_after_s`
    ├── CorruptCheckpoint     bytes on disk or from a peer are not what their manifest says
    └── Internal              a defect of gearfall

`infra.net.grpc_errors` maps the tree to gRPC status and back, `services.router.doors.openai_errors`
to OpenAI error bodies; a test walks the tree and fails on a class without a mapping.
"""


class GearfallError(Exception):
    """Base of every error that gearfall raises on purpose; the message says what to change."""

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        retry_after_s: float | None = None,
        code: str | None = None,
    ) -> None:
        """`param`: name of the offending field; `retry_after_s`: honest wait before a retry.

        `code`: what a program may tell apart within one class (context_length_exceeded).
        """
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s
        self.code = code


class InvalidRequest(GearfallError):
    """The caller must change the request."""


class Unauthenticated(GearfallError):
    """No or unknown credentials."""


class PermissionDenied(GearfallError):
    """A known caller that may not do this."""


class NotFound(GearfallError):
    """No such model, deployment, request or key."""


class Conflict(GearfallError):
    """A compare-and-set lost, a name is taken or a thing is in use."""


class Overloaded(GearfallError):
    """A limit or quota is reached."""


class DeadlineExceeded(GearfallError):
    """The deadline passed before the work was done."""


class Unavailable(GearfallError):
    """A part of the system is down or not ready."""


class CorruptCheckpoint(GearfallError):
    """Bytes on disk or from a peer are not what their manifest or header says."""


class Internal(GearfallError):
    """A defect of gearfall itself."""
