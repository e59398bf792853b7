"""The run-time replacement: nvcc-built programs and libraries run unmodified."""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import cusim
import pytest
import torch

CU = Path(__file__).parent / "cu"
pytestmark = pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc")
INVALID_VALUE, INVALID_CONFIGURATION = 1, 9  # of cudaError_t


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    d = tmp_path_factory.mktemp("rt")
    base = [
        "nvcc",
        "-gencode",
        "arch=compute_90a,code=compute_90a",
        "-gencode",
        "arch=compute_80,code=compute_80",
        "-cudart",
        "shared",
        str(CU / "runtime.cu"),
    ]
    (d / "libcuda.so").symlink_to(Path(cusim.library_path()).parent / "libcuda.so.1")  # to link against
    subprocess.run([*base, "--no-compress", "-shared", "-Xcompiler", "-fPIC", "-o", d / "lib.so", "-L", d, "-lcuda"], check=True)
    subprocess.run([*base, "-DNO_DRIVER", "-o", d / "prog"], check=True)
    return d


def test_program(built):
    env = dict(os.environ, LD_LIBRARY_PATH=str(Path(cusim.library_path()).parent), CUSIM_LOG="1")
    r = subprocess.run([built / "prog"], env=env, capture_output=True, text=True)
    if "libzstd" in r.stderr:
        pytest.skip("compressed PTX and no libzstd")
    assert r.returncode == 0, r.stdout + r.stderr
    assert "warp instructions" in r.stderr


def test_library(built):
    cusim.runtime()
    lib = ctypes.CDLL(str(built / "lib.so"))
    assert lib.demo() == 0
    with cusim.environment(quiet=1):
        assert lib.too_much_shared() == INVALID_VALUE and "may be 49152 together without cudaFuncSetAttribute" in cusim.last_message()
        assert lib.driver() == 0
        assert lib.out_of_bounds() == 700 and "out-of-bounds" in cusim.last_message()
    assert lib.demo() == 0 and cusim.last_stats()["inst"] > 0


def test_shared_memory_that_a_kernel_declares_counts(built):
    """An H100 answered "invalid argument" to 48 KB for a kernel that declares 512 bytes."""
    own, room, chip, small = 512, 48 * 1024, 232_448, 101_376
    cusim.runtime()
    lib = ctypes.CDLL(str(built / "lib.so"))
    with cusim.environment(quiet=1, chip="H100"):
        assert lib.room_of_mixed() == room - own
        assert lib.launch_mixed(room - own) == 0
        assert lib.launch_mixed(room) == INVALID_VALUE and "49152 bytes of dynamic shared memory and 512 that" in cusim.last_message()
        assert lib.allow_mixed(chip) == lib.allow_mixed(-1) == INVALID_VALUE
        assert lib.launch_mixed(room) == INVALID_VALUE, "a refused attribute changes nothing"
        assert lib.allow_mixed(room) == lib.launch_mixed(room) == 0
        assert lib.launch_mixed(room + 4) == INVALID_VALUE and "asked for 49152" in cusim.last_message()
        assert lib.allow_mixed(chip - own) == lib.launch_mixed(chip - own) == 0
        assert lib.launch_greedy() == INVALID_CONFIGURATION and "the kernel declares 49156 bytes" in cusim.last_message()
    with cusim.environment(quiet=1, chip="A100"):
        assert lib.launch_mixed(chip - own) == INVALID_CONFIGURATION and "the chip allows 166912" in cusim.last_message()
    other = cusim.Module(cusim.compile_cuda((CU / "runtime.cu").read_text(), "sm_80", ["-DNO_DRIVER"]))
    (mixed,) = [name for name in other.kernels if "mixed" in name]
    with cusim.environment(chip="sm_120"):
        other.launch(mixed, 1, 32, [torch.zeros(32)], shared=small - own)
        with pytest.raises(cusim.SimError, match="the chip allows 101376"):
            other.launch(mixed, 1, 32, [torch.zeros(32)], shared=small)


def test_grids_and_blocks(built):
    cusim.runtime()
    lib = ctypes.CDLL(str(built / "lib.so"))
    with cusim.environment(quiet=1):
        for fits in (
            (70_000, 1, 1, 1, 1, 1),
            (1, 65_535, 1, 1, 1, 1),
            (1, 1, 65_535, 1, 1, 1),
            (1, 1, 1, 16, 1, 64),
            (1, 1, 1, 1, 1024, 1),
        ):
            assert lib.launch_nothing(*fits) == 0, fits
        for wrong in (
            *((1, 65_536, 1, 1, 1, 1), (1, 1, 65_536, 1, 1, 1), (0, 1, 1, 1, 1, 1), (-(2**31), 1, 1, 1, 1, 1)),
            *((1, 1, 1, 1025, 1, 1), (1, 1, 1, 1, 1, 65), (1, 1, 1, 32, 64, 1), (1, 1, 1, 65_536, 65_536, 1), (1, 1, 1, 0, 1, 1)),
        ):
            assert lib.launch_nothing(*wrong) == INVALID_CONFIGURATION, wrong
        assert lib.launch_narrow(64) == 0 and lib.launch_narrow(65) == INVALID_CONFIGURATION
        assert "the kernel allows 64" in cusim.last_message()


def test_cluster():
    for arch in ("sm_90a",):
        m = cusim.Module(cusim.compile_cuda((CU / "cluster.cu").read_text(), arch))
        x = torch.arange(512, dtype=torch.int32)
        y = torch.zeros(512, dtype=torch.int32)
        for opt in ({}, {"sched": "random", "seed": 4, "async_mode": "random"}, {"async_mode": "early"}):
            m.launch("ring", 8, 64, [x, y], **opt)
            X = x.view(8, 64)
            e = torch.stack([(X[b // 4 * 4 + (b + 1) % 4] + 1000 * ((b + 1) % 4)).flip(0) for b in range(8)])
            for b in (0, 4):
                e[b, 0] = X[b, 0] + 256
            assert torch.equal(y.view(8, 64), e)
            f, g = torch.randn(256), torch.zeros(512)
            m.launch("multicast", 2, 256, [f, g], **opt)
            assert torch.equal(g, torch.cat([f, 2 * f]))
            v = torch.zeros(4, dtype=torch.int32)
            m.launch("remote_arrive", 2, 32, [v], **opt)
            assert v.tolist() == [10, 20, 30, 40]
    m = cusim.Module(cusim.compile_cuda((CU / "cluster.cu").read_text(), "sm_90a", ["-DNO_CLUSTER_SYNC"]))
    with pytest.raises(cusim.SimError) as e:
        m.launch("ring", 8, 64, [x, y])
    assert e.value.kind in ("race", "uninitialised")


def test_torch_extension(tmp_path):
    """A PyTorch operator with only a CUDA implementation, called on CPU tensors."""
    import cusim.torch_ext as te

    T = Path(torch.__file__).parent
    so = tmp_path / "ext.so"
    r = subprocess.run(
        [
            "nvcc",
            "-std=c++20",
            f"-I{T}/include",
            "-gencode",
            "arch=compute_80,code=compute_80",
            "--no-compress",
            "-cudart",
            "shared",
            "-shared",
            "-Xcompiler",
            "-fPIC",
            f"-L{T}/lib",
            "-ltorch_cpu",
            "-lc10",
            "-o",
            str(so),
            str(CU / "torch_ext.cu"),
        ],
        capture_output=True,
        text=True,
    )
    if r.returncode:
        pytest.skip("this PyTorch has no stable-ABI headers: " + r.stderr[:200])
    te.load(so)
    x = torch.randn(1000)
    torch.testing.assert_close(te.call(torch.ops.cusim_test.add1.default, x, 0), x + 1)
    with pytest.raises(cusim.SimError) as e:
        te.call(torch.ops.cusim_test.add1.default, x, 3, sim={"quiet": 1})
    assert e.value.kind == "global-oob" and "1000" in str(e.value)
