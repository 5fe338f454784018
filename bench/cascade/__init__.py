"""The benches of cascades and gears."""
