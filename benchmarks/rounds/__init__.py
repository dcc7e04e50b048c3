"""Benchmark of rounds, by `python -m benchmarks.rounds`."""
