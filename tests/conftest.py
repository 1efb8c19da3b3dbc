import ctypes
import sys

import pytest
import torch
from hypothesis import settings

settings.register_profile("tests", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("tests")


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


class _SignalStack(ctypes.Structure):
    _fields_ = (
        ("address", ctypes.c_void_p),
        ("flags", ctypes.c_int),
        ("size", ctypes.c_size_t),
    )


@pytest.fixture(autouse=True)
def _no_signal_stack():
    """Of two CPU plugins OpenVINO puts the freed stack of the first back, and the next signal kills."""
    yield
    if sys.platform == "linux":
        disable = 2
        ctypes.CDLL(None).sigaltstack(ctypes.byref(_SignalStack(None, disable, 0)), None)
