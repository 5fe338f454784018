"""`python -m bench.start [flags]`."""

from bench.measuring.entry import run_bench
from bench.start.run import main

if __name__ == "__main__":
    run_bench(main)
