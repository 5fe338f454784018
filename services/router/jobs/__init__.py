"""Jobs of this router, what waits of them, and what the scheduler is told of that."""
