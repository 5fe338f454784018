"""Checkpoints from beyond a node's disk: `python -m bench.tiers`."""
