"""The worker: runs continuous batching on one accelerator or CPU slot and pushes tokens."""
