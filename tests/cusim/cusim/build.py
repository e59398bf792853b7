"""Build libcusim.so with g++; the result is cached by a hash of the sources and the compiler flags."""

import fcntl
import hashlib
import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SRC = ROOT / "src"


def _hash():
    h = hashlib.sha256()
    for p in sorted([*list(SRC.glob("*")), ROOT / "Makefile"]):
        h.update(p.name.encode())
        h.update(p.read_bytes())
    try:  # -march=native: the cache must not travel between different processors
        flags = [l for l in open("/proc/cpuinfo") if l.startswith("flags")]
        h.update(flags[0].encode() if flags else b"")
    except OSError:
        pass
    h.update((os.environ.get("CXX", "g++") + os.environ.get("CXXFLAGS", "")).encode())
    return h.hexdigest()[:16]


def build_dir():
    return Path(os.environ.get("CUSIM_BUILD_DIR") or ROOT.parents[1] / "build" / "cusim") / _hash()


def library():
    """Path of the built shared library (built now if needed, by whichever process asks first)."""
    d = build_dir()
    lib = d / "libcusim.so"
    d.mkdir(parents=True, exist_ok=True)
    with (d / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (d / "ok").exists():
            jobs = max(1, min(8, os.cpu_count() or 1))
            r = subprocess.run(["make", "-C", str(ROOT), f"-j{jobs}", f"B={d}"], capture_output=True, text=True)
            if r.returncode:
                raise RuntimeError("building cusim failed:\n" + r.stdout[-4000:] + r.stderr[-8000:])
            for o in d.glob("*.o"):
                o.unlink()
            (d / "ok").write_text("")
    return lib


if __name__ == "__main__":
    print(library())
