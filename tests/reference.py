"""The quantizer once more, in numpy: what every form of it is compared with."""

import numpy as np


def codes(x, lower, step, bits):
    """Ties to even; arrays broadcast."""
    return np.rint(((x - lower) / step).clip(0, 2**bits - 1))


def integers(x, lower, step, zero, bits, refinement):
    """Multiples of the lattice step, that of the value 0 is 0."""
    return codes(x, lower, step, bits) * refinement - zero


def quantize(x, lower, step, zero, bits, refinement):
    """Nearest value."""
    fine = step / np.float32(refinement)
    return integers(x, lower, step, zero, bits, refinement).astype(fine.dtype) * fine
