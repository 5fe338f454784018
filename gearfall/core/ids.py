"""Identifiers, and the rule for names that become keys and file names."""

import re
from typing import NewType

from gearfall.core.errors import InvalidRequest

RequestId = NewType("RequestId", str)
JobId = NewType("JobId", str)
ModelName = NewType("ModelName", str)
DeploymentName = NewType("DeploymentName", str)
NodeId = NewType("NodeId", str)
WorkerId = NewType("WorkerId", str)
"""Names one incarnation of a worker process: a restarted worker has another id."""
RouterId = NewType("RouterId", str)
"""Names one incarnation of a router process."""
Epoch = NewType("Epoch", int)
"""Ownership generation of a job, from 1."""

_NAME = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,94}[a-z0-9])?")


def parse_name(text: str, *, param: str) -> str:
    """Return `text` if it may name a model or deployment, else raise InvalidRequest.

    Lower-case letters, digits, '.', '_' and '-', 1 to 96 long, first and last a letter or digit, no
    '..': such a name is safe as a key, a file name and a part of a URL.
    """
    if not _NAME.fullmatch(text) or ".." in text:
        shown = text if len(text) <= 96 else text[:96] + "..."
        raise InvalidRequest(
            f"{param} {shown!r} is not a valid name: use 1 to 96 lower-case letters, digits, "
            "'.', '_' or '-', starting and ending with a letter or digit, without '..'",
            param=param,
        )
    return text


def is_url(path: str) -> bool:
    """Whether a path names a directory elsewhere, and not one of a machine's own file system."""
    return "://" in path
