"""`python -m bench.scheduler NAME [flags]` runs the module of that name beside this one."""

import importlib
import pkgutil
import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str]) -> int:
    """Run one bench; its `main` gets the flags that follow the name."""
    names = sorted(
        module.name
        for module in pkgutil.iter_modules([str(Path(__file__).parent)])
        if module.name != "__main__"
    )
    if not argv or argv[0] not in names:
        sys.stderr.write(f"usage: python -m bench.scheduler {{{','.join(names)}}} [flags]\n")
        return 2
    bench = importlib.import_module(f"bench.scheduler.{argv[0]}")
    return int(bench.main(argv[1:]) or 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
