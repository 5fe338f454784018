"""Cascades under load: fixed replicas, gears that shift, answers from a profile."""
