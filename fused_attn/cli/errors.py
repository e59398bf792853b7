"""What a command says when its user, not the program, has to change something."""

from __future__ import annotations

from importlib.util import find_spec


class CommandError(Exception):
    """A mistake of the caller's, shown as one sentence without a traceback."""


def require_packages(command: str, *packages: str) -> None:
    """Raises a CommandError that names the pip extra when packages of an optional command are missing.

    Example:
        >>> require_packages("demo", "torch")
        >>> require_packages("demo", "nothing")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        fused_attn.cli.errors.CommandError: the demo command needs nothing; ... pip install "fused-attn[demo]"
    """
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise CommandError(f'the {command} command needs {", ".join(missing)}; install it with: pip install "fused-attn[{command}]"')
