"""Benchmarks against published systems, interleaved on the same work; `make bench` runs them."""
