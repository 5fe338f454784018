"""Checkpoints in the gearfall format: written from safetensors, read, verified, exported."""
