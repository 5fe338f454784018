"""The job queue in Redis Streams."""
