r"""Says which backend would run an attention problem, and why each other one would not.

Tensors take no memory here, so any size can be asked about. Example:

  python -m fused_attn explain --q 1,32,8192,128 --k 1,8,8192,128 --dtype bfloat16 \
      --mask "causal & window(1024, 0)" --mods "softcap(30)" --aux probs,lse --requires-grad --on sm_90

Masks: causal, window(left, right), band(width), prefix(n), lengths(n), padding(n), documents(length), dense.
Modifications: softcap(cap), alibi, bias, bias(batch, heads, q_len, kv_len), decay.
"""

from __future__ import annotations

import argparse
import ast
import functools
from typing import Any, get_args

import torch
from torch import Tensor

import fused_attn as fa
from fused_attn.auxiliary import SWITCHES
from fused_attn.backends import Target
from fused_attn.checks import FLOATS, require_integer
from fused_attn.cli.errors import CommandError
from fused_attn.cli.grammar import build, parse_calls
from fused_attn.lowering import Grid
from fused_attn.normalizers import Gumbel, Hard, TopK
from fused_attn.problem import EmptyRows

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS}
_SCORINGS = {"dotproduct": fa.DotProduct, "l2": fa.NegativeL2, "additive": fa.Additive}
_NORMALIZERS = {"sigmoid": fa.Sigmoid, "topk": TopK, "hard": Hard, "gumbel": Gumbel}
LEARNED = ("q", "k", "v", "sinks", "alibi", "bias", "decay")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``fused_attn.attention``, in words."""
    shape: dict[str, Any] = {"type": _shape, "metavar": "B,H,L,D"}
    parser.add_argument("--q", default=(1, 8, 1024, 64), help="shape of the queries (default 1,8,1024,64)", **shape)
    parser.add_argument("--k", help="shape of the keys (default: that of the queries)", **shape)
    parser.add_argument("--v", help="shape of the values (default: that of the keys)", **shape)
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default cpu)")
    parser.add_argument("--on", metavar="TARGET", help="where it would run: cpu, sm_80, sm_90, ... (default: on --device)")
    parser.add_argument("--no-library", action="store_true", help="with --on: without the native library")
    parser.add_argument("--mask", help='such as "causal & window(128, 0)"')
    parser.add_argument("--mods", help='score modifications in order, such as "softcap(30), alibi"')
    parser.add_argument("--scale", type=float)
    parser.add_argument("--scoring", help=f'instead of scale * q k^T: {", ".join(_SCORINGS)}, such as "l2(0.5)"')
    parser.add_argument("--normalizer", help=f'instead of the softmax: {", ".join(_NORMALIZERS)}, such as "sigmoid(-6)"')
    parser.add_argument("--empty-rows", choices=get_args(EmptyRows), default="zero", help="what rows without keys give")
    parser.add_argument("--q-offset", type=int, help="key position of query 0")
    parser.add_argument("--dropout", type=float, metavar="P")
    parser.add_argument("--sinks", action="store_true", help="one logit per head that joins the denominator")
    parser.add_argument("--aux", type=_names, default=(), metavar="NAMES", help="probs, scores, lse, max_scores, column_sums, entropy")
    parser.add_argument(
        "--requires-grad",
        type=_names,
        nargs="?",
        const=("q", "k", "v"),
        default=(),
        metavar="NAMES",
        help=f"any of {', '.join(LEARNED)} (default q,k,v)",
    )


def run(args: argparse.Namespace) -> int:
    """Prints the table of ``fused_attn.explain``."""
    unknown = [name for name in args.requires_grad if name not in LEARNED]
    if unknown:
        raise CommandError(f"--requires-grad takes any of {', '.join(LEARNED)}; got {', '.join(unknown)}")
    try:
        q, k, v = (
            _tensor(args, name, shape) for name, shape in (("q", args.q), ("k", args.k or args.q), ("v", args.v or args.k or args.q))
        )
        on = None if args.on is None else Target(args.on, library=not args.no_library)
        print(fa.explain(q, k, v, on=on, **_options(args, q, k)))
    except (TypeError, ValueError) as error:
        raise CommandError(str(error)) from None
    return 0


def _shape(text: str) -> tuple[int, ...]:
    """Four sizes."""
    sizes = tuple(int(part) for part in text.split(","))
    if len(sizes) != 4 or min(sizes) < 0:
        raise argparse.ArgumentTypeError(f"must be four sizes batch,heads,length,dim; got {text}")
    return sizes


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
    except RuntimeError:
        raise CommandError(f"--device must be cpu, cuda or cuda:N; got {text!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise CommandError(f"--device must be cpu, cuda or cuda:N; got {text!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise CommandError(f"this torch sees {torch.cuda.device_count()} CUDA devices; got {text!r}. See python -m fused_attn info")
    return device


def _tensor(args: argparse.Namespace, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
    """One element seen as a whole tensor."""
    tensor = torch.zeros((), dtype=dtype or DTYPES[args.dtype], device=_device(args.device)).expand(shape)
    return tensor.requires_grad_(name in args.requires_grad)


def _options(args: argparse.Namespace, q: Tensor, k: Tensor) -> dict[str, Any]:
    unknown = [name for name in args.aux if name not in SWITCHES]
    if unknown:
        raise CommandError(f"--aux takes any of {', '.join(SWITCHES)}; got {', '.join(unknown)}")
    options: dict[str, Any] = {"scale": args.scale, "q_offset": args.q_offset, "empty_rows": args.empty_rows}
    for name, makers in (("scoring", _SCORINGS), ("normalizer", _NORMALIZERS)):
        text = getattr(args, name)
        if text:
            (call,) = parse_calls(text, ast.BitAnd)
            options[name] = build(call, makers, name)
    grid = Grid((q.shape[0], q.shape[1], q.shape[2], k.shape[2]), q.device)
    if args.mask:
        masks = [build(call, _mask_makers(grid), "mask") for call in parse_calls(args.mask, ast.BitAnd)]
        options["mask"] = functools.reduce(lambda a, b: a & b, masks)
    if args.mods:
        options["score_mods"] = tuple(build(call, _mod_makers(args, grid), "score modification") for call in parse_calls(args.mods, None))
    if args.dropout is not None:
        options["dropout"] = fa.Dropout(args.dropout)
    if args.sinks:
        options["sinks"] = _tensor(args, "sinks", (grid.shape[1],), torch.float32)
    if args.aux:
        options["return_aux"] = fa.AuxRequest.of([name in args.aux for name in SWITCHES])
    return options


def _mask_makers(grid: Grid) -> dict[str, Any]:
    batch, _, q_len, kv_len = grid.shape
    keys = torch.arange(kv_len, device=grid.device)
    return {
        "causal": fa.Causal,
        "window": fa.SlidingWindow,
        "slidingwindow": fa.SlidingWindow,
        "band": fa.Band,
        "chunked": fa.Chunked,
        "blockcausal": fa.BlockCausal,
        "prefix": fa.PrefixLM,
        "prefixlm": fa.PrefixLM,
        "lengths": lambda n: fa.ValidLengths(torch.full((batch,), n, device=grid.device)),
        "padding": lambda n: fa.KeyPadding((keys < n).expand(batch, -1)),
        "documents": functools.partial(_documents, keys),
        "dense": lambda: fa.Dense(torch.ones((), dtype=torch.bool, device=grid.device).expand(q_len, kv_len)),
    }


def _documents(keys: Tensor, length: int) -> fa.Documents:
    require_integer("length", length, 1)
    return fa.Documents(keys // length)


def _mod_makers(args: argparse.Namespace, grid: Grid) -> dict[str, Any]:
    _, heads, q_len, kv_len = grid.shape
    learned = functools.partial(_tensor, args, dtype=torch.float32)
    return {
        "softcap": fa.SoftCap,
        "alibi": lambda: fa.ALiBi(learned("alibi", (heads,))),
        "bias": lambda *shape: fa.Bias(learned("bias", shape or (1, heads, q_len, kv_len))),
        "decay": lambda: fa.DecayBias(learned("decay", (1, heads, kv_len))),
        "selective": fa.Selective,
    }
