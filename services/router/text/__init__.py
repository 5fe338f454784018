"""Prompts into tokens, and tokens into text."""
