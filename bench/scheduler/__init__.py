"""Benches of the scheduler, one module each: `python -m bench.scheduler NAME`."""
