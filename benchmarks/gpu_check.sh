#!/bin/sh
# Parity, sanitizer and benchmarks on this machine's GPU: benchmarks/gpu_check.sh OUT_DIR. Builds and installs nothing.
# PYTHON names the interpreter, FUSED_ATTN_LIBRARY a CUDA library built elsewhere.
root=$(cd "$(dirname "$0")/.." && pwd) || exit
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec "${PYTHON:-python3}" -m benchmarks.gpu_check "$@"
