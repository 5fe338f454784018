"""Gear plans, the gear in force, and whether its promise is kept."""
