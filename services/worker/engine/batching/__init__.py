"""Which jobs run, and which of their tokens a step computes. Pure."""
