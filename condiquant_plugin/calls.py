"""Which module computes what, seen from inside a call."""

from __future__ import annotations

from types import FrameType

from torch import nn

_CALL = nn.Module._call_impl.__code__


def calling_module(frame: FrameType | None) -> nn.Module | None:
    """The innermost module that is being called; what a layer's hooks compute is the layer's."""
    while frame is not None and frame.f_code is not _CALL:
        frame = frame.f_back
    return None if frame is None else frame.f_locals["self"]
