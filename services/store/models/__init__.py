"""What models there are, and what is known of each beside its bytes."""
