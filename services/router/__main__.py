"""Runs the router: `python -m services.router`."""

from services.router.main import main

if __name__ == "__main__":
    main()
