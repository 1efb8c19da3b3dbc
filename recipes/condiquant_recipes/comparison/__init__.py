"""``condiquant compare``: every method on one float network, side by side."""
