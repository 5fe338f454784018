"""What every test shares: Hypothesis without a deadline of its own, since pytest has one."""

from hypothesis import settings

settings.register_profile("gearfall", deadline=None, print_blob=True)
settings.load_profile("gearfall")
