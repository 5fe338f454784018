"""The router's added latency and throughput: `python -m bench.front_door`."""
