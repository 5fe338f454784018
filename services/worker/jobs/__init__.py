"""Claimed jobs between queue, engine and router."""
