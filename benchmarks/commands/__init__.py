"""Commands of the benchmarks that belong to fused_attn alone."""
