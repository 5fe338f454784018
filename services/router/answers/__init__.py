"""Whole answers: recorded, kept for requests that come again, followed up."""
