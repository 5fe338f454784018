"""What a start costs, learned from starts."""
