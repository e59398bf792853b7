"""Reads masks and score modifications as they are written in Python: names of the vocabulary, numbers, and ``&``.

Only calls of known names with literal numbers are accepted; nothing is ever evaluated.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from typing import Any

from fused_attn.cli.errors import CommandError

Call = tuple[str, tuple[Any, ...], dict[str, Any]]


def parse_calls(text: str, separator: type[ast.BitAnd] | None) -> list[Call]:
    """The calls in ``a(1) & b(None)`` (with ``ast.BitAnd``) or ``a(1), b(2)`` (None) as (name, arguments, keywords).

    Example:
        >>> parse_calls("causal & window(128, right=0)", ast.BitAnd)
        [('causal', (), {}), ('window', (128,), {'right': 0})]
    """
    try:
        root = ast.parse(text.strip(), mode="eval").body
        listed = root.elts if isinstance(root, ast.Tuple) else [root]
        return [_call(node) for node in (listed if separator is None else _operands(root))]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        joined = "joined with &" if separator is not None else "separated by commas"
        raise CommandError(f"cannot read {text!r}: write names with numbers in parentheses, {joined}, such as window(128, 0)") from None


def _operands(node: ast.expr) -> list[ast.expr]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitAnd):
        return [*_operands(node.left), *_operands(node.right)]
    return [node]


def _call(node: ast.expr) -> Call:
    if isinstance(node, ast.Name):
        return node.id, (), {}
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or any(k.arg is None for k in node.keywords):
        raise ValueError
    return node.func.id, tuple(_number(a) for a in node.args), {str(k.arg): _number(k.value) for k in node.keywords}


def _number(node: ast.expr) -> Any:
    value = ast.literal_eval(node)
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
        raise ValueError
    return value


def build(call: Call, makers: Mapping[str, Callable[..., Any]], kind: str) -> Any:
    """Makes the object that a call names; ``softcap``, ``SoftCap`` and ``soft_cap`` are the same name."""
    name, arguments, keywords = call
    maker = makers.get(name.lower().replace("_", ""))
    if maker is None:
        raise CommandError(f"there is no {kind} {name!r}; known are {', '.join(makers)}")
    try:
        return maker(*arguments, **keywords)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise CommandError(f"{kind} {name}: {error}") from None
