"""`python -m bench.load [flags]`."""

from bench.load.run import main
from bench.measuring.entry import run_bench

if __name__ == "__main__":
    run_bench(main)
