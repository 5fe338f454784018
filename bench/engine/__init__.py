"""Generated tokens a second: `python -m bench.engine`."""
