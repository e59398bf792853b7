"""x-transformers' attention (2.31) without x-transformers: same constructors, state dicts, results and errors, on fused kernels.

``Attend`` is the core; names are the package's own.
"""

from __future__ import annotations

from fused_attn.nn.x_transformers.attend import Attend
from fused_attn.nn.x_transformers.cope import CoPE
from fused_attn.nn.x_transformers.intermediates import Intermediates

__all__ = ["Attend", "CoPE", "Intermediates"]
