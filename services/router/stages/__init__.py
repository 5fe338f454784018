"""One choice's way through the stages of its cascade."""
