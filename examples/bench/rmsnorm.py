"""RMS norm (arXiv 1910.07467), declared to be measured: ``fused-attn-bench run --load rmsnorm.py``."""

import torch

from fused_attn_bench import Operation

rmsnorm = Operation(
    "rmsnorm",
    axes=("rows", "columns"),
    inputs=lambda make, sizes: {"x": make.normal(sizes["rows"], sizes["columns"]), "weight": make.normal(sizes["columns"])},
    reference=lambda x, weight: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight,
    cases=("plain/fwd/float32/1024x1024", "plain/fwd+bwd/float32/1024x1024"),
    gradients=True,
)

rmsnorm.provider("torch")(lambda x, weight: torch.nn.functional.rms_norm(x, x.shape[-1:], weight, 1e-6))


@rmsnorm.provider("dot")
def by_dot(x, weight):
    """A dot product of each row with itself."""
    return x * torch.rsqrt(torch.linalg.vecdot(x, x)[..., None] / x.shape[-1] + 1e-6) * weight
