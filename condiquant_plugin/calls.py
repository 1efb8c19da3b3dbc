"""Which module computes what, and from what, seen from inside a call."""

from __future__ import annotations

from collections.abc import Mapping
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_CALL = nn.Module._call_impl.__code__
_PRODUCTS = frozenset(
    {
        torch.matmul,
        torch.bmm,
        torch.mm,
        Tensor.matmul,
        Tensor.bmm,
        Tensor.mm,
        Tensor.__matmul__,
        Tensor.__rmatmul__,
    }
)


def calling_module(frame: FrameType | None) -> nn.Module | None:
    """The innermost module that is being called; what a layer's hooks compute is the layer's."""
    while frame is not None and frame.f_code is not _CALL:
        frame = frame.f_back
    return None if frame is None else frame.f_locals["self"]


def factors(func: Any, args: Any, kwargs: Mapping[str, Any]) -> list[Tensor]:
    """What a call multiplies, if it is a product of two matrices or a fused attention; else nothing."""
    if func is scaled_dot_product_attention:
        count = 3
    elif func in _PRODUCTS or (func is torch.einsum and _contracts(args[0])):
        count = 2
    else:
        return []
    if func is scaled_dot_product_attention:
        given = [*args, *(kwargs[name] for name in ("query", "key", "value") if name in kwargs)]
        return given[:count]
    return [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)][:count]


def _contracts(equation: Any) -> bool:
    """Whether an einsum has two factors and sums over an index that both have."""
    if not isinstance(equation, str) or equation.count(",") != 1:
        return False
    inputs, _, result = equation.partition("->")
    first, second = map(set, inputs.split(","))
    return bool((first & second) - set(result) - set(" ."))


def product_name(module: str, index: int) -> str:
    """Name of the ``index``-th product that a module computes, counted as :func:`factors` finds them."""
    return f"{module}/matmul/{index}"


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
