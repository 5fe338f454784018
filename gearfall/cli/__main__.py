"""`python -m gearfall.cli` is the `gearfall` command."""

from gearfall.cli.main import main

main()
