"""What a worker and its engine processes say to each other, and the memory that they share."""
