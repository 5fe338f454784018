"""One model on this worker, from its assignment to its end."""
