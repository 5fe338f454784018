"""A fleet in discrete-event time, driven by the scheduler's own rules. Pure and seeded."""
