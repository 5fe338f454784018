"""The simpler policies that ours is compared with."""
