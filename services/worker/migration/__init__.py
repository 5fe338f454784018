"""Running jobs that leave this worker or come to it."""
