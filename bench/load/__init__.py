"""Checkpoints into memory: `python -m bench.load`."""
