"""What every test shares: Hypothesis without a deadline of its own, the cluster, the scratch."""

import os

# Read when gRPC is imported: a test that forks has no use for gRPC's threads in the child, which
# die of it now and then.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"

from hypothesis import settings

from tests.cluster_host import client, demo_family, doors, host, rest_url
from tests.scratch import pytest_configure, pytest_sessionfinish, scratch

__all__ = ["client", "demo_family", "doors", "host", "rest_url"]
__all__ += ["pytest_configure", "pytest_sessionfinish", "scratch"]

# A change is held against the same examples as the one before it; `make properties` draws new ones.
settings.register_profile("same", deadline=None, print_blob=True, derandomize=True)
settings.register_profile("search", deadline=None, print_blob=True)
settings.load_profile(os.environ.get("GEARFALL_PROPERTIES", "same"))
