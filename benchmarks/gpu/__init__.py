"""Proves and measures this library on a GPU in one go: `python -m benchmarks.gpu`."""
