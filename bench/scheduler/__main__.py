"""`python -m bench.scheduler NAME [flags]` runs the module of that name beside this one."""

import sys

from bench.measuring.entry import run_named

if __name__ == "__main__":
    sys.exit(run_named("bench.scheduler", sys.argv[1:]))
