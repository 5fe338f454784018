#!/usr/bin/env python3
"""Exits 0 when a page answers 200: `gearfall-health http://127.0.0.1:9100/metrics`.

Only the standard library and no site packages, so that asking every few seconds costs little.
"""

import sys
import urllib.request

with urllib.request.urlopen(sys.argv[1], timeout=3) as reply:  # noqa: S310 - the caller's own URL
    sys.exit(0 if reply.status == 200 else 1)
