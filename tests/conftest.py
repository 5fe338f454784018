"""What every test shares: Hypothesis without a deadline of its own, and the cluster's fixtures."""

from hypothesis import settings

from tests.cluster_host import client, demo_family, doors, host, rest_url

__all__ = ["client", "demo_family", "doors", "host", "rest_url"]

settings.register_profile("gearfall", deadline=None, print_blob=True)
settings.load_profile("gearfall")
