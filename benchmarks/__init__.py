"""Benchmarks of fused_attn against plain torch and torch's own kernels: ``python -m benchmarks run``."""
