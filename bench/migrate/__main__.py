"""`python -m bench.migrate [flags]`."""

from bench.measuring.entry import run_bench
from bench.migrate.run import main

if __name__ == "__main__":
    run_bench(main)
