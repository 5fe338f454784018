"""A family of three small language models that differ clearly in cost and in accuracy."""
