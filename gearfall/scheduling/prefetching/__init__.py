"""What is brought near before anybody asks."""
