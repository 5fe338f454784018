"""The checkpoint format's values and rules."""
