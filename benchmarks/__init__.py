"""Measurements of the package: `python -m benchmarks.cpu` for one CPU thread."""
