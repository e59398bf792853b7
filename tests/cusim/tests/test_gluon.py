"""Gluon (explicit Hopper) kernels as an oracle."""

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")
import cusim.triton as ct
import gluon_kernels as gk

MODES = [{"async_mode": "late"}, {"async_mode": "early"}, {"async_mode": "random", "sched": "random", "seed": 7}]


@pytest.mark.parametrize("mode", MODES, ids=["late", "early", "random"])
@pytest.mark.parametrize("st", [2, 3])
@pytest.mark.parametrize("bn", [64, 128])
def test_warp_specialised_matmul(mode, st, bn):
    torch.manual_seed(0)
    M, N, K = 200, 136, 320
    a, b, c = torch.randn(M, K).bfloat16(), torch.randn(N, K).bfloat16(), torch.zeros(M, N).bfloat16()
    k = ct.compile_kernel(
        gk.ws_matmul,
        {"A": "*bf16", "B": "*bf16", "C": "*bf16", "M": "i32", "N": "i32", "K": "i32"},
        {"BM": 128, "BN": bn, "BK": 64, "ST": st},
        90,
        num_warps=4,
    )
    ct.launch(k, (2, -(-N // bn)), [a, b, c, M, N, K], **mode)
    torch.testing.assert_close(c.float(), a.float() @ b.float().T, atol=0.1, rtol=2e-2)
