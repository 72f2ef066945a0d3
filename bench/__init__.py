"""Timing and benchmarks, imported as `effformer.bench`."""
