import ctypes as C
import functools
import json
import os
import struct
import subprocess
import tempfile
from pathlib import Path

from . import build

CHECKS = {"global": 1, "align": 2, "shared": 4, "uninit": 8, "race": 16, "wgmma": 32, "proxy": 64}
ALL = sum(CHECKS.values())
_ASYNC = {"late": 0, "early": 1, "random": 2}

#: defaults for every launch; change in place, e.g. cusim.defaults["threads"] = 4
defaults = {
    "checks": True,
    "async_mode": "late",
    "sched": "rr",
    "seed": 1,
    "threads": 1,
    "counters": False,
    "strict": True,
    "quantum": 512,
    "max_inst": 1 << 31,
}  # max_inst: per warp; stops endless loops


class SimError(RuntimeError):
    """The simulator found a fault in the kernel (or met an instruction it does not know). `.kind` names the check."""

    def __init__(self, kind, msg):
        super().__init__(msg)
        self.kind = kind


class _CLaunch(C.Structure):
    _fields_ = [
        ("grid", C.c_uint32 * 3),
        ("block", C.c_uint32 * 3),
        ("cluster", C.c_uint32 * 3),
        ("dyn_smem", C.c_uint32),
        ("cooperative", C.c_int32),
        ("checks", C.c_uint32),
        ("async_mode", C.c_int32),
        ("sched", C.c_int32),
        ("seed", C.c_uint64),
        ("threads", C.c_int32),
        ("counters", C.c_int32),
        ("strict", C.c_int32),
        ("quantum", C.c_int32),
        ("max_inst", C.c_uint64),
        ("params", C.c_void_p),
        ("params_size", C.c_uint64),
        ("err", C.c_void_p),
        ("err_len", C.c_uint64),
        ("kind", C.c_void_p),
        ("kind_len", C.c_uint64),
        ("stats", C.c_void_p),
        ("stats_len", C.c_uint64),
        ("out", C.c_void_p),
        ("out_len", C.c_uint64),
    ]


_lib = None


@functools.cache
def is_private():
    """Whether the process had a CUDA run-time before this one (a CUDA build of torch brings it). A library reaches the replacement then
    only when it was linked against ``library_path()`` and is opened with RTLD_DEEPBIND."""
    loaded = {Path(line.split()[-1]) for line in Path("/proc/self/maps").read_text().splitlines() if "libcudart.so" in line}
    return any(not path.with_name("libcusim.so").exists() for path in loaded)


def library_path():
    library = build.library()
    return str(library.with_name("libcusim_private.so") if is_private() else library)


def lib():
    global _lib
    if _lib is None:
        _lib = C.CDLL(library_path(), mode=C.RTLD_GLOBAL)
        _lib.cusim_module_load.restype = C.c_void_p
        _lib.cusim_module_load.argtypes = [C.c_char_p, C.c_uint64, C.c_void_p, C.c_uint64]
        _lib.cusim_module_free.argtypes = [C.c_void_p]
        _lib.cusim_module_info.argtypes = [C.c_void_p, C.c_void_p, C.c_uint64]
        _lib.cusim_kernel_info.argtypes = [C.c_void_p, C.c_char_p, C.c_void_p, C.c_void_p, C.c_uint64]
        _lib.cusim_global_addr.restype = C.c_uint64
        _lib.cusim_global_addr.argtypes = [C.c_void_p, C.c_char_p, C.POINTER(C.c_uint64)]
        _lib.cusim_register.argtypes = [C.c_uint64, C.c_uint64, C.c_char_p]
        _lib.cusim_unregister.argtypes = [C.c_uint64]
        _lib.cusim_launch.argtypes = [C.c_void_p, C.c_char_p, C.POINTER(_CLaunch)]
    return _lib


def runtime():
    """Load the CUDA run-time replacement into this process; libraries that need libcudart.so.13 (or libcuda.so.1) then bind to it."""
    l = lib()
    stub = Path(library_path()).parent / "libcuda.so.1"
    if stub.exists() and not is_private():
        C.CDLL(str(stub), mode=C.RTLD_GLOBAL)
    return l


class environment:
    """Options for launches made through the run-time replacement (they are read from CUSIM_* variables at every launch):
    with cusim.environment(async_mode="early", checks=False): library.call()"""

    def __init__(self, **opt):
        self.opt = opt

    def __enter__(self):
        names = {
            "async_mode": "CUSIM_ASYNC",
            "sched": "CUSIM_SCHED",
            "seed": "CUSIM_SEED",
            "threads": "CUSIM_THREADS",
            "counters": "CUSIM_COUNTERS",
            "strict": "CUSIM_STRICT",
            "max_inst": "CUSIM_MAX_INST",
            "quantum": "CUSIM_QUANTUM",
            "checks": "CUSIM_CHECKS",
            "chip": "CUSIM_CHIP",
            "quiet": "CUSIM_QUIET",
        }
        self.old = {}
        for k, v in self.opt.items():
            if k == "checks":
                v = check_mask(v)
            n = names[k]
            self.old[n] = os.environ.get(n)
            os.environ[n] = str(int(v) if isinstance(v, bool) else v)
        return self

    def __exit__(self, *a):
        for n, v in self.old.items():
            if v is None:
                os.environ.pop(n, None)
            else:
                os.environ[n] = v


def last_message():
    """Text of the last error reported through the run-time replacement."""
    lib().cusim_rt_message.restype = C.c_char_p
    return lib().cusim_rt_message().decode(errors="replace")


def last_kind():
    """The check that reported the last error (as SimError.kind)."""
    lib().cusim_rt_kind.restype = C.c_char_p
    return lib().cusim_rt_kind().decode()


def last_stats():
    """Counters of the last launch made through the run-time replacement."""
    lib().cusim_rt_stats.restype = C.c_char_p
    t = lib().cusim_rt_stats().decode()
    return json.loads(t) if t else None


def check_mask(ck):
    if ck is True:
        return ALL
    if ck is False:
        return 0
    if isinstance(ck, int):
        return ck
    names = [ck] if isinstance(ck, str) else list(ck)
    neg = [n[1:] for n in names if n.startswith("-")]
    pos = [n for n in names if not n.startswith("-")]
    mask = sum(CHECKS[n] for n in pos) if pos else ALL
    for n in neg:
        mask &= ~CHECKS[n]
    return mask


def register(addr, size, name=""):
    """Tell the bounds check about a block of memory that kernels may touch."""
    lib().cusim_register(int(addr), int(size), name.encode())


def unregister(addr):
    lib().cusim_unregister(int(addr))


def _is_tensor(a):
    return hasattr(a, "data_ptr") and hasattr(a, "untyped_storage")


def _memory_of(a):
    """(pointer, start of storage, bytes) of a tensor / array, or None."""
    if _is_tensor(a):
        s = a.untyped_storage()
        return a.data_ptr(), s.data_ptr(), s.nbytes()
    if hasattr(a, "__array_interface__"):
        p = a.__array_interface__["data"][0]
        b = a if a.base is None or not hasattr(a.base, "__array_interface__") else a.base
        return p, b.__array_interface__["data"][0], b.nbytes
    return None


class TensorMap(bytes):
    """128 bytes to pass for a `const __grid_constant__ CUtensorMap` parameter. `.memory` is kept alive and bounds-checked."""

    memory = None


_ELEM = {
    "uint8": 0,
    "int8": 0,
    "uint16": 1,
    "int16": 1,
    "uint32": 2,
    "int32": 3,
    "uint64": 4,
    "int64": 5,
    "float16": 6,
    "float32": 7,
    "float64": 9,
    "bfloat16": 10,
    "float8_e4m3fn": 0,
    "float8_e5m2": 0,
    "tf32": 11,
}


def tensor_map(t, box, swizzle=0, dims=None, strides=None, elem=None, elem_strides=None, fill=0):
    """Tiled tensor map of a tensor.  `box` is given innermost dimension first; `dims`/`strides` (strides in bytes for
    dimensions 1..) default to the tensor's own, innermost first.  swizzle: 0, 32, 64 or 128 (bytes)."""
    ptr, base, nbytes = _memory_of(t)
    dt = elem or str(t.dtype).replace("torch.", "")
    shape = list(t.shape)[::-1]
    es = t.element_size() if hasattr(t, "element_size") else t.itemsize
    if dims is None:
        dims = shape
    if strides is None:
        st = [int(x) * (es if _is_tensor(t) else 1) for x in (t.stride() if _is_tensor(t) else t.strides)][::-1]
        if st[0] != es:
            raise ValueError("the innermost dimension must be contiguous")
        strides = st[1:]
    rank = len(dims)
    out = C.create_string_buffer(128)
    a64 = C.c_uint64 * 5
    a32 = C.c_uint32 * 5

    def pad(v):
        return list(v) + [1] * (5 - len(v))

    sw = {0: 0, 32: 1, 64: 2, 128: 3}[swizzle]
    r = lib().cusim_tensor_map(
        out,
        _ELEM[dt],
        rank,
        C.c_uint64(ptr),
        a64(*pad(dims)),
        a64(*pad(strides)),
        a32(*pad(box)),
        a32(*pad(elem_strides or [1] * rank)),
        0,
        sw,
        fill,
    )
    if r:
        raise ValueError(
            [
                "",
                "bad rank",
                "address not 16-byte aligned",
                "box size must be 1..256",
                "strides must be multiples of 16 bytes",
                "inner box bytes must be a multiple of 16",
                "inner box wider than the swizzle",
            ][r]
        )
    m = TensorMap(out.raw)
    m.memory = (ptr, base, nbytes, t)
    return m


class LaunchResult:
    def __init__(self, stats, output, seconds):
        self.stats, self.output, self.seconds = stats, output, seconds

    def __repr__(self):
        n = self.stats["inst"]
        return f"<cusim: {n} warp instructions, {self.seconds * 1e3:.1f} ms, {n / max(self.seconds, 1e-9) / 1e6:.1f} M/s>"


def _triple(v):
    v = (v,) if isinstance(v, int) else tuple(v)
    return tuple(int(x) for x in v) + (1,) * (3 - len(v))


class Module:
    """A PTX module. Kernels are decoded on first launch."""

    def __init__(self, ptx):
        text = ptx.encode() if isinstance(ptx, str) else ptx
        err = C.create_string_buffer(8192)
        self._h = lib().cusim_module_load(text, len(text), err, 8192)
        if not self._h:
            raise SimError("parse", err.value.decode(errors="replace"))
        n = lib().cusim_module_info(self._h, None, 0)
        buf = C.create_string_buffer(n + 8)
        lib().cusim_module_info(self._h, buf, n + 8)
        self.kernels = {}
        for l in buf.value.decode().splitlines():
            name, ps, rq, mx, tgt = l.split("|")
            self.kernels[name] = {
                "params": [tuple(int(x) for x in p.split(":")) for p in ps.split(",") if p],
                "reqntid": tuple(map(int, rq.split(","))),
                "maxntid": tuple(map(int, mx.split(","))),
                "target": tgt,
            }

    def __del__(self):
        if getattr(self, "_h", None) and _lib is not None:
            _lib.cusim_module_free(self._h)
            self._h = None

    def info(self, kernel):
        """Decode a kernel; reports its size, or raises SimError naming the first unsupported instruction."""
        out = (C.c_uint64 * 5)()
        err = C.create_string_buffer(8192)
        if lib().cusim_kernel_info(self._h, kernel.encode(), out, err, 8192):
            raise SimError("unsupported", err.value.decode(errors="replace"))
        return {
            "instructions": out[0],
            "register_bytes_per_lane": out[1],
            "static_shared": out[2],
            "local_bytes": out[3],
            "uses_dynamic_shared": bool(out[4]),
            **self.kernels[kernel],
        }

    def global_address(self, name):
        n = C.c_uint64()
        a = lib().cusim_global_addr(self._h, name.encode(), C.byref(n))
        return a, n.value

    def launch(self, kernel, grid, block, args=(), shared=0, cluster=(1, 1, 1), cooperative=False, memory=(), **opt):
        """Run a kernel.  args: tensors / arrays (their address is passed), ints, floats, bytes (structs, tensor maps).
        memory: further tensors the kernel may touch.  opt: see cusim.defaults; checks may be True, False, a set of names
        from cusim.CHECKS, or '-name' strings to switch off."""
        import time

        o = {**defaults, **opt}
        unknown = set(o) - set(defaults)
        if unknown:
            raise TypeError(f"unknown option {unknown}")
        if kernel not in self.kernels:
            raise KeyError(f"no kernel {kernel!r}; have {list(self.kernels)}")
        params = self.kernels[kernel]["params"]
        if len(args) != len(params):
            raise TypeError(f"{kernel} takes {len(params)} arguments, got {len(args)}")
        total = max([off + size for off, size, _ in params], default=0)
        blob = bytearray(total)
        mem = []
        for i, (a, (off, size, _)) in enumerate(zip(args, params)):
            m = _memory_of(a)
            if m is not None:
                v = struct.pack("<Q", m[0])
                mem.append((m[1], m[2], f"argument {i}"))
            elif isinstance(a, (bytes, bytearray)):
                v = bytes(a)
                if isinstance(a, TensorMap) and a.memory:
                    mem.append((a.memory[1], a.memory[2], f"argument {i} (tensor map)"))
            elif a is None:
                v = bytes(size)
            elif isinstance(a, float):
                v = struct.pack("<f" if size == 4 else "<d", a)
            elif isinstance(a, (int, bool)) or hasattr(a, "__index__"):
                v = (int(a) & ((1 << (8 * size)) - 1)).to_bytes(size, "little")
            elif isinstance(a, (C.Structure, C._SimpleCData)):
                v = bytes(a)
            else:
                raise TypeError(f"argument {i}: cannot pass {type(a)}")
            if len(v) != size:
                raise TypeError(f"argument {i} of {kernel}: {len(v)} bytes given, the parameter has {size}")
            blob[off : off + size] = v
        for i, a in enumerate(memory):
            m = _memory_of(a)
            if m:
                mem.append((m[1], m[2], f"memory {i}"))
        mask = check_mask(o["checks"])
        l = _CLaunch()
        l.grid[:] = _triple(grid)
        l.block[:] = _triple(block)
        l.cluster[:] = _triple(cluster)
        l.dyn_smem = int(shared)
        l.cooperative = int(cooperative)
        l.checks = mask
        l.async_mode = _ASYNC[o["async_mode"]]
        l.sched = {"rr": 0, "random": 1}[o["sched"]]
        l.seed = int(o["seed"])
        l.threads = int(o["threads"])
        l.counters = int(o["counters"])
        l.strict = int(o["strict"])
        l.quantum = int(o["quantum"])
        l.max_inst = int(o["max_inst"])
        pb = (C.c_char * max(1, total)).from_buffer_copy(bytes(blob) or b"\0")
        l.params = C.addressof(pb)
        l.params_size = total
        err, kind, st, out = (C.create_string_buffer(n) for n in (16384, 64, 8192, 1 << 16))
        l.err, l.err_len = C.addressof(err), 16384
        l.kind, l.kind_len = C.addressof(kind), 64
        l.stats, l.stats_len = C.addressof(st), 8192
        l.out, l.out_len = C.addressof(out), 1 << 16
        seen = set()
        for base, n, name in mem:
            if n and base not in seen:
                seen.add(base)
                register(base, n, name)
        t = time.perf_counter()
        try:
            rc = lib().cusim_launch(self._h, kernel.encode(), C.byref(l))
        finally:
            for b in seen:
                unregister(b)
        dt = time.perf_counter() - t
        if rc:
            raise SimError(kind.value.decode(), err.value.decode(errors="replace"))
        return LaunchResult(json.loads(st.value.decode()), out.value.decode(errors="replace"), dt)


def compile_cuda(source, arch="sm_90a", flags=(), nvcc=None):
    """CUDA C++ text -> PTX text with nvcc (no GPU needed)."""
    nvcc = nvcc or os.environ.get("NVCC", "nvcc")
    a = arch.replace("sm_", "")
    with tempfile.TemporaryDirectory() as d:
        src = Path(d) / "k.cu"
        src.write_text(source)
        out = Path(d) / "k.ptx"
        cmd = [nvcc, "-ptx", f"-arch=compute_{a}", "-std=c++17", "-lineinfo", "-o", str(out), str(src), *flags]
        r = subprocess.run(cmd, capture_output=True, text=True)
        if r.returncode:
            raise RuntimeError(r.stderr[-8000:])
        return out.read_text()
