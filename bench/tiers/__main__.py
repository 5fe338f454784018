"""`python -m bench.tiers [flags]`."""

from bench.measuring.entry import run_bench
from bench.tiers.run import main

if __name__ == "__main__":
    run_bench(main)
