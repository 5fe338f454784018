"""How a bench is run: `python -m bench.NAME [flags]`, `python -m bench.NAME WHICH [flags]`."""

import importlib
import pkgutil
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from gearfall.infra.local.ctrl_c import take_sigterm_as_ctrl_c


def run_bench(main: Callable[[], int | None]) -> NoReturn:
    """Run a bench and exit; one that is ended from outside takes its scratch directories along."""
    take_sigterm_as_ctrl_c()
    sys.exit(main() or 0)


def run_named(package: str, argv: Sequence[str]) -> int:
    """Run the module of `package` that `argv` names first; its `main` gets what follows.

    Only modules with a `main` are benches; the others serve them.
    """
    take_sigterm_as_ctrl_c()
    place = importlib.import_module(package).__path__
    found = (module.name for module in pkgutil.iter_modules(place))
    names = sorted(name for name in found if not name.startswith("__"))
    name = argv[0].replace("-", "_") if argv else ""
    if name in names:
        bench = importlib.import_module(f"{package}.{name}")
        if hasattr(bench, "main"):
            return int(bench.main(argv[1:]) or 0)
    sys.stderr.write(f"usage: python -m {package} {{{','.join(names)}}} [flags]\n")
    return 2
