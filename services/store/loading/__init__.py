"""Loads: one for each model, whoever asks, and what the leader wishes for."""
