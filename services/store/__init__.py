"""The store: holds the checkpoints of a node in tiers and hands them to workers without a copy."""
