"""Stubs for products of activations (attention), which a network computes without a module.

``layerwise_quantize`` replaces modules, and Brevitas' ``functional_quantization_mode`` a function by one
module for all its calls. Here every product gets stubs of its own, children of the module that computes it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable
from functools import cache, wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from condiquant_plugin.calls import calling_module, factors, product_name

STUBS = "product_stubs"


class ProductOperand(nn.Identity):
    """Stands at a factor of a product, for ``layerwise_quantize`` to put a ``QuantIdentity`` there."""


class ProductStubs(nn.Module):
    """Both factors of one product of matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.input0, self.input1 = ProductOperand(), ProductOperand()

    def forward(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        leaves, structure = tree_flatten((args, kwargs))
        places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        for place, stub in zip(places, (self.input0, self.input1), strict=False):
            leaves[place] = stub(leaves[place])
        args, kwargs = tree_unflatten(leaves, structure)
        return func(*args, **kwargs)


class AttentionStubs(nn.Module):
    """The operands of both products of a fused attention, computed apart once they are quantized.

    Brevitas' ``QuantScaledDotProductAttention`` has operators that neither OpenVINO nor ONNX takes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.q_scaled, self.k_transposed = ProductOperand(), ProductOperand()
        self.attn_output_weights, self.v = ProductOperand(), ProductOperand()

    def forward(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if isinstance(self.v, ProductOperand):
            return func(*args, **kwargs)
        return self._attention(*args, **kwargs)

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if enable_gqa:
            groups = query.size(-3) // key.size(-3)
            key, value = (x.repeat_interleave(groups, -3) for x in (key, value))
        if is_causal:
            attn_mask = query.new_ones(query.size(-2), key.size(-2)).tril() > 0
        scaled = query * (1 / math.sqrt(query.size(-1)) if scale is None else scale)
        scores = self.q_scaled(scaled) @ self.k_transposed(key.transpose(-2, -1))
        if attn_mask is None:
            weights = scores.softmax(-1)
        else:
            if attn_mask.dtype == torch.bool:
                attn_mask = torch.where(attn_mask, 0.0, -torch.inf).to(query.dtype)
            # A row that sees no key is zero, as in the function, instead of NaN.
            lowest = torch.finfo(query.dtype).min
            seen = attn_mask.amax(-1, keepdim=True) > lowest
            weights = (scores + attn_mask.clamp(min=lowest)).softmax(-1) * seen
        if dropout_p:
            weights = F.dropout(weights, dropout_p)
        return self.attn_output_weights(weights) @ self.v(value)


class _ProductMode(TorchFunctionMode):
    """Takes the products of one call of a module through their stubs, counted in order."""

    def __init__(self, holder: nn.Module) -> None:
        super().__init__()
        self._holder, self._products = holder, 0

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        stubs = None
        if factors(func, args, kwargs) and calling_module(sys._getframe(1)) is self._holder:
            stubs = getattr(self._holder, STUBS)._modules.get(str(self._products))
            self._products += 1
        if stubs is None:
            return func(*args, **kwargs)
        return stubs(func, args, kwargs)


def rule_name(name: str) -> str:
    """What rules know a layer by, a product or a stub in it as :func:`product_name` calls it."""
    holder, separator, rest = name.rpartition(f"{STUBS}.")
    return product_name(holder.rstrip("."), int(rest.split(".")[0])) if separator else name


def stubs_name(holder: str, index: int) -> str:
    """Module name of the stubs of the ``index``-th product that the module ``holder`` computes."""
    return ".".join(filter(None, (holder, STUBS, str(index))))


def insert_stubs(model: nn.Module, products: Iterable[tuple[str, int, Any]]) -> None:
    """Give products their stubs, in place; the output of ``model`` stays the same to the bit.

    Args:
        products: the module that computes it, its number there, and the function.
    """
    for name, index, func in products:
        holder = model.get_submodule(name)
        if STUBS not in holder._modules:
            holder.add_module(STUBS, nn.ModuleDict())
            holder.__class__ = _with_stubs(type(holder))  # type: ignore[arg-type]
        fused = func is scaled_dot_product_attention
        stubs = AttentionStubs() if fused else ProductStubs()
        holder.get_submodule(STUBS).add_module(str(index), stubs)


@cache
def _with_stubs(kind: type[nn.Module]) -> type[nn.Module]:
    """A class instead of an attribute ``forward``: deep copies and exceptions take care of themselves."""

    @wraps(kind.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with _ProductMode(self):
            return kind.forward(self, *args, **kwargs)

    def reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        return _without_state, (kind,), self.__getstate__()

    namespace = {"forward": forward, "__reduce_ex__": reduce, "__module__": kind.__module__}
    return type(kind.__name__, (kind,), namespace)


def _without_state(kind: type[nn.Module]) -> nn.Module:
    derived = _with_stubs(kind)  # type: ignore[arg-type]
    return derived.__new__(derived)
