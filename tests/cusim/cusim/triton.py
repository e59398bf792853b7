"""Compile Triton kernels ahead of time (no GPU needed) and run the PTX in the simulator."""

from . import core


def compile_kernel(fn, signature, constexprs=None, arch=90, num_warps=4, num_stages=3, attrs=None, **options):
    """signature: {arg: '*bf16' | 'i32' | 'fp32' | 'constexpr' | ...}.  Pointers are taken as 16-byte aligned."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constexprs = constexprs or {}
    sig = {k: ("constexpr" if k in constexprs else v) for k, v in signature.items()}
    names = list(fn.arg_names)
    for k in names:
        if k not in sig and k in constexprs:
            sig[k] = "constexpr"
    sig = {k: sig[k] for k in names}
    if attrs is None:
        attrs = {(i,): [["tt.divisibility", 16]] for i, k in enumerate(names) if str(sig[k]).startswith("*")}
    cls = ASTSource
    if type(fn).__name__ == "GluonJITFunction":
        from triton.experimental.gluon._runtime import GluonASTSource as cls
    src = cls(fn=fn, signature=sig, constexprs=constexprs, attrs=attrs)
    return triton.compile(src, target=GPUTarget("cuda", arch, 32), options=dict(num_warps=num_warps, num_stages=num_stages, **options))


def launch(compiled, grid, args, **opt):
    """args: run-time arguments only (no constexprs), in order."""
    m = core.Module(compiled.asm["ptx"])
    md = compiled.metadata
    name = md.name
    params = m.kernels[name]["params"]
    args = list(args)
    scratch = []
    g = core._triple(grid)
    n = g[0] * g[1] * g[2]
    extra = len(params) - len(args)
    import torch

    if extra == 2:  # global scratch and profile scratch
        size = getattr(md, "global_scratch_size", 0) or 0
        buf = torch.zeros(max(1, size * n * max(1, md.num_ctas)) + 256, dtype=torch.uint8)
        scratch.append(buf)
        off = (-buf.data_ptr()) % 128
        args += [buf[off:] if size else None, None]
    threads = m.kernels[name]["reqntid"][0] or md.num_warps * 32
    nc = md.num_ctas
    cl = (nc, 1, 1)
    gg = (g[0] * nc, g[1], g[2])
    return m.launch(name, gg, (threads, 1, 1), args, shared=md.shared, cluster=cl, memory=scratch, **opt)


def run(fn, grid, args, signature, constexprs=None, arch=90, num_warps=4, num_stages=3, sim=None, **options):
    """Compile and simulate in one call; `sim` holds simulator options."""
    k = compile_kernel(fn, signature, constexprs, arch, num_warps, num_stages, **options)
    return launch(k, grid, args, **(sim or {}))
