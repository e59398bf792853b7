import sys

from . import core


def main(argv):
    if argv[:1] == ["lib"]:
        print(core.library_path())
        return 0
    if argv[:1] == ["inspect"] and len(argv) > 1:
        m = core.Module(open(argv[1]).read())
        bad = 0
        for k, v in m.kernels.items():
            try:
                i = m.info(k)
                print(
                    f"{k}\n  target {v['target']}, {i['instructions']} instructions, {i['register_bytes_per_lane'] // 4} register slots, {i['static_shared']} B static shared, {i['local_bytes']} B local, parameters {[p[1] for p in v['params']]}"
                )
            except core.SimError as e:
                bad = 1
                print(f"{k}\n  NOT SUPPORTED: {e}")
        return bad
    if argv[:1] == ["run"] and len(argv) > 4:
        # run file.ptx kernel grid block [args...]: f32:N / i32:N / bf16:N random tensors, int:V, float:V
        import torch

        m = core.Module(open(argv[1]).read())
        args = []
        shared = 0
        for a in argv[5:]:
            t, v = a.split(":")
            if t == "shared":
                shared = int(v)
            elif t == "int":
                args.append(int(v))
            elif t == "float":
                args.append(float(v))
            else:
                args.append(
                    {
                        "f32": lambda n: torch.randn(n),
                        "i32": lambda n: torch.zeros(n, dtype=torch.int32),
                        "bf16": lambda n: torch.randn(n).bfloat16(),
                        "f16": lambda n: torch.randn(n).half(),
                    }[t](int(v))
                )

        def tri(s):
            return tuple(int(x) for x in s.split(","))

        r = m.launch(argv[2], tri(argv[3]), tri(argv[4]), args, shared=shared, counters=True)
        print(r.output, end="")
        print(r)
        print({k: v for k, v in r.stats["classes"].items() if v})
        return 0
    print(
        "usage: python -m cusim lib | inspect FILE.ptx | run FILE.ptx KERNEL GRID BLOCK [f32:N|i32:N|bf16:N|f16:N|int:V|float:V|shared:BYTES ...]"
    )
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
