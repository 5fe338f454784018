"""Entry point: `python -m services.store`."""

import os

# Read when gRPC is imported. uvloop starts a program by fork and exec, and in between gRPC would
# start its threads anew, in a copy of a process that had them at work: one in twenty of the
# processes that compute canaries died of it.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"

from services.store.main import main

main()
