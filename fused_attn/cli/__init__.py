"""The commands of ``python -m fused_attn``: one module each, with ``add_arguments(parser)`` and ``run(args)``."""
