"""Widths that are no grid's; imports nothing, for commands that load no torch."""

FLOAT_BITS = 32
"""Of what stays as it is."""
