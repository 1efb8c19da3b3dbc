"""Which module computes what, and from what, seen from inside a call."""

from __future__ import annotations

from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_CALL = nn.Module._call_impl.__code__


def calling_module(frame: FrameType | None) -> nn.Module | None:
    """The innermost module that is being called; what a layer's hooks compute is the layer's."""
    while frame is not None and frame.f_code is not _CALL:
        frame = frame.f_back
    return None if frame is None else frame.f_locals["self"]


class Dependence(TorchDispatchMode):
    """Follows what is computed from one tensor, through every operator, while it is active."""

    def __init__(self) -> None:
        super().__init__()
        # Kept alive: a storage that is freed gives its identity to another.
        self._reached: dict[int, torch.UntypedStorage] = {}

    def start(self, tensor: Tensor) -> Tensor:
        """Follow ``tensor``, and return it."""
        storage = tensor.untyped_storage()
        self._reached[storage._cdata] = storage
        return tensor

    def reaches(self, value: Any) -> bool:
        """Whether ``value`` is a tensor that is computed from the one followed."""
        return _has_storage(value) and value.untyped_storage()._cdata in self._reached

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(map(self.reaches, tree_leaves((args, kwargs)))):
            for value in filter(_has_storage, tree_leaves(result)):
                self.start(value)
        return result


def _has_storage(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout is torch.strided
