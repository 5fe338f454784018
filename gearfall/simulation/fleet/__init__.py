"""A cluster under the scheduler's own rules."""
