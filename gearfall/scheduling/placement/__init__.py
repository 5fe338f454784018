"""Where replicas start, and who makes room for them."""
