"""Layers that people already use, on this package's attention: same constructors, state dicts, results and errors, O(length) memory."""
