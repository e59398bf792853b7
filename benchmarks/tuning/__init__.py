"""Tiles of Hopper's kernels, chosen by measuring: ``python -m benchmarks tune``."""
