"""From a fork to the first token."""
