"""From nothing running to a first token: `python -m bench.start`."""
