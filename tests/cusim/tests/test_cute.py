"""CuTe (CUTLASS) as an oracle: a TMA + wgmma GEMM in several shared-memory layouts, built by nvcc into an ordinary shared
library and run unmodified on the run-time replacement."""

import ctypes
import importlib.util
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cusim
import pytest
import torch

CU = Path(__file__).parent / "cu" / "cute_gemm.cu"


def include():
    if os.environ.get("CUTLASS_INCLUDE"):
        return os.environ["CUTLASS_INCLUDE"]
    s = importlib.util.find_spec("cutlass_library")
    p = Path(s.origin).parent / "source" / "include" if s else None
    return str(p) if p and p.exists() else None


pytestmark = pytest.mark.skipif(not shutil.which("nvcc") or not include(), reason="needs nvcc and CUTLASS headers (CUTLASS_INCLUDE)")
CASES = [
    (0, 0, "K_SW128", "K_SW128"),
    (0, 1, "K_SW64", "MN_SW128"),
    (1, 1, "MN_SW64", "MN_SW32"),
    (1, 0, "MN_SW128", "K_SW32"),
    (0, 0, "K_INTER", "K_INTER"),
    (1, 1, "MN_INTER", "MN_INTER"),
]
if not os.environ.get("CUSIM_ALL_CUTE"):
    CASES = CASES[:4]


@pytest.fixture(scope="module")
def libs(tmp_path_factory):
    d = tmp_path_factory.mktemp("cute")

    def one(c):
        so = d / f"{c[2]}_{c[3]}.so"
        r = subprocess.run(
            [
                "nvcc",
                "-std=c++17",
                f"-I{include()}",
                "--expt-relaxed-constexpr",
                "-gencode",
                "arch=compute_90a,code=compute_90a",
                "-cudart",
                "shared",
                "-shared",
                "-Xcompiler",
                "-fPIC",
                "-DTYPE=bfloat16_t",
                f"-DAMN={c[0]}",
                f"-DBMN={c[1]}",
                f"-DLAYOUT_A=Layout_{c[2]}_Atom",
                f"-DLAYOUT_B=Layout_{c[3]}_Atom",
                "-o",
                str(so),
                str(CU),
            ],
            capture_output=True,
            text=True,
        )
        return str(so) if r.returncode == 0 else r.stderr[:2000]

    with ThreadPoolExecutor(2) as ex:
        return dict(zip(CASES, ex.map(one, CASES)))


@pytest.mark.parametrize("mode", ["late", "early", "random"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[2]}-{c[3]}")
def test_cute_gemm(libs, case, mode, monkeypatch):
    cusim.runtime()
    assert libs[case].endswith(".so"), libs[case]
    lib = ctypes.CDLL(libs[case])
    M, N, K = 256, 128, 256
    torch.manual_seed(0)
    a, b, c = torch.randn(M, K).bfloat16(), torch.randn(N, K).bfloat16(), torch.zeros(M, N)
    A = a.T.contiguous() if case[0] else a
    B = b.T.contiguous() if case[1] else b
    with cusim.environment(async_mode=mode):
        assert lib.run(*[ctypes.c_void_p(x.data_ptr()) for x in (A, B, c)], M, N, K) == 0
    assert (c - a.float() @ b.float().T).abs().max() < 1e-3


@pytest.mark.skipif(not os.environ.get("CUSIM_ALL_CUTE"), reason="slow build; set CUSIM_ALL_CUTE=1")
@pytest.mark.parametrize(
    ("kernel", "epilogue"),
    [("KernelTmaWarpSpecializedPingpong", "TmaWarpSpecialized"), ("KernelTmaWarpSpecializedCooperative", "TmaWarpSpecializedCooperative")],
)
def test_cutlass_collective(tmp_path, kernel, epilogue):
    """A complete CUTLASS persistent warp-specialised GEMM: 2x1 clusters, multicast TMA, TMA-store epilogue."""
    so = tmp_path / "g.so"
    util = Path(include()).parent / "tools" / "util" / "include"
    subprocess.run(
        [
            "nvcc",
            "-std=c++17",
            f"-I{include()}",
            f"-I{util}",
            "--expt-relaxed-constexpr",
            "-gencode",
            "arch=compute_90a,code=compute_90a",
            "--no-compress",
            "-cudart",
            "shared",
            "-shared",
            "-Xcompiler",
            "-fPIC",
            f"-DKER=cutlass::gemm::{kernel}",
            f"-DEPI=cutlass::epilogue::{epilogue}",
            "-o",
            str(so),
            str(CU.parent / "cutlass_gemm.cu"),
        ],
        check=True,
        capture_output=True,
    )
    cusim.runtime()
    lib = ctypes.CDLL(str(so))
    M, N, K = 512, 384, 320
    torch.manual_seed(0)
    a, b = torch.randn(M, K).bfloat16(), torch.randn(N, K).bfloat16()
    for opt in ({"async_mode": "late"}, {"async_mode": "early"}, {"async_mode": "random", "sched": "random"}):
        c = torch.zeros(M, N).bfloat16()
        with cusim.environment(**opt):
            assert lib.run(*[ctypes.c_void_p(x.data_ptr()) for x in (a, b, c)], M, N, K) == 0, cusim.last_message()
        torch.testing.assert_close(c.float(), a.float() @ b.float().T, atol=0.3, rtol=1e-2)
