"""`python -m bench.front_door [flags]`."""

from bench.front_door.run import main
from bench.measuring.entry import run_bench

if __name__ == "__main__":
    run_bench(main)
