"""Entry point: `python -m services.store`."""

from services.store.main import main

main()
