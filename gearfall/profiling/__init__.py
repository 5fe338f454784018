"""Measures models for the planner: how fast they compute, how well they answer, how certainly."""
