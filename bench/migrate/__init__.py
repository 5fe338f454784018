"""What moving a request costs: `python -m bench.migrate`."""
