"""A whole cluster as child processes on one machine."""
