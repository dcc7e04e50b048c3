"""The benchmark on a real chat model: `python -m benchmarks.real_model`."""
