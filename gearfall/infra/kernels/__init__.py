"""The engine's CPU kernels, over torch tensors and numpy arrays."""
