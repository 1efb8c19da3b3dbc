"""Where a factor on one layer's output channels can be taken back by the layers behind it.

Between them are only functions ``f`` with ``f(s x) = s f(x)`` for a positive factor per channel: layouts,
paddings and rectifiers (Nagel et al., arXiv 1906.04721, section 4.1).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from condiquant_plugin.forward_pass import run

_CONVOLUTIONS = frozenset({torch.conv1d, torch.conv2d, torch.conv3d})
_FOLLOWED = frozenset(
    {
        *(F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_),
        *(F.leaky_relu, torch.prelu, Tensor.prelu, F.dropout),
        *(Tensor.view, Tensor.reshape, torch.reshape, Tensor.flatten, torch.flatten),
        *(Tensor.unflatten, Tensor.permute, torch.permute, Tensor.transpose, torch.transpose),
        *(Tensor.movedim, torch.movedim, Tensor.squeeze, torch.squeeze, Tensor.unsqueeze),
        *(torch.unsqueeze, Tensor.contiguous, Tensor.clone, torch.clone, Tensor.detach),
        *(Tensor.roll, torch.roll, Tensor.__getitem__),
    }
)
"""Channels may end up anywhere: what a link promises is tried on an image before it is used."""
_CASTS = frozenset({Tensor.type_as, Tensor.to, Tensor.float, Tensor.contiguous})


@dataclass(eq=False, repr=False)
class Link:
    """A layer or norm, and the layers that alone read what it gives."""

    weight: nn.Parameter
    """Output channels along axis 0."""
    bias: nn.Parameter | None
    consumers: list[nn.Parameter] = field(default_factory=list)
    """Weights with the same channels as inputs, along axis 1."""

    @torch.no_grad()
    def scale(self, factors: Tensor) -> None:
        """Divide the channels between by positive ``factors``, shape ``(channels,)``."""
        self.weight.div_(factors.view(-1, *[1] * (self.weight.ndim - 1)))
        if self.bias is not None:
            self.bias.div_(factors)
        for consumer in self.consumers:
            consumer.mul_(factors.view(1, -1, *[1] * (consumer.ndim - 2)))

    def tensors(self) -> list[nn.Parameter]:
        """All that :meth:`scale` changes."""
        return [self.weight, *([] if self.bias is None else [self.bias]), *self.consumers]


Reader = Callable[[Link, nn.Parameter, Tensor, Callable[[Tensor, Tensor], Tensor]], None]
"""Is given a link, one of its consumers, what that reads, and the layer as a function of the input and
the weight."""


@torch.no_grad()
def find_links(model: nn.Module, batch: Any, read: Reader | None = None) -> list[Link]:
    """All links of what ``model`` computes from ``batch``.

    Args:
        model: its fake quantizers, if any, are off.
        batch: a tensor, or a tuple of positional or a dict of keyword arguments.
        read: called at every consumer, while the network computes; the link may yet prove to be none.
    """
    flow = _Flow(model, read)
    with flow:
        output = run(model, batch)
    flow.spoil([leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)])
    return flow.links()


class _Flow(TorchFunctionMode):
    """Follows the outputs of layers and norms as long as nothing but factors would change."""

    def __init__(self, model: nn.Module, read: Reader | None) -> None:
        super().__init__()
        self.parameters = {p.data_ptr(): p for p in model.parameters() if p.numel()}
        self.read = read
        self.found: dict[int, Link] = {}
        self.tracked: dict[int, tuple[Tensor, Link]] = {}
        """By identity, for which the tensors are kept alive."""
        self.views: dict[int, tuple[Tensor, int]] = {}
        """Of parameters, likewise."""
        self.spoiled: set[int] = set()
        """Links by their weight, whose channels something else reads."""
        self.used: set[int] = set()
        """Parameters that something else than their layer takes."""
        self.sources: dict[int, set[int]] = {}
        """Of every weight of a layer, which links feed it; 0 is none."""

    def links(self) -> list[Link]:
        return [link for key, link in self.found.items() if self._holds(key, link)]

    def _holds(self, key: int, link: Link) -> bool:
        keys = [consumer.data_ptr() for consumer in link.consumers]
        changed = {key, *keys} | (set() if link.bias is None else {link.bias.data_ptr()})
        if not keys or key in self.spoiled or self.used & changed:
            return False
        return all(self.sources[k] == {key} for k in keys)

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):
            return result
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if func is F.linear or func in _CONVOLUTIONS:
            self._layer(func, args, kwargs, result)
        elif func is F.layer_norm:
            self._norm(args, kwargs, result)
        elif func in _CASTS and result is given[0]:
            pass  # nothing to cast
        elif given and self._is_followed(func, args, kwargs):
            self.spoil(given[1:])
            if id(given[0]) in self.tracked:
                self.tracked[id(result)] = result, self.tracked[id(given[0])][1]
            elif (pointer := self._pointer(given[0])) is not None:
                self.views[id(result)] = result, pointer
        else:
            self.spoil(given)
        return result

    def _is_followed(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        if func is F.pad:
            names = dict(zip(("input", "pad", "mode", "value"), args, strict=False)) | dict(kwargs)
            return names.get("mode", "constant") != "constant" or not names.get("value")
        return func in _FOLLOWED

    def _layer(
        self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Tensor
    ) -> None:
        names = dict(zip(("input", "weight", "bias"), args, strict=False)) | dict(kwargs)
        x, given, bias = (_tensor(names.get(name)) for name in ("input", "weight", "bias"))
        weight = self._parameter(given)
        if weight is None or x is None or (bias is not None and self._parameter(bias) is None):
            self.spoil([each for each in (x, given) if each is not None])
            return
        link = self.tracked[id(x)][1] if id(x) in self.tracked else None
        fits = func is F.linear or x.shape[-weight.ndim + 1] == weight.shape[1]
        if link is not None and not (fits and weight.shape[1] == len(link.weight)):
            self.spoil([x])
            link = None
        key = 0 if link is None else link.weight.data_ptr()
        self.sources.setdefault(weight.data_ptr(), set()).add(key)
        if link is not None:
            if not any(weight is each for each in link.consumers):
                link.consumers.append(weight)
            if self.read is not None:
                rest = args[2:], {k: v for k, v in kwargs.items() if k not in ("input", "weight")}
                self.read(link, weight, x, lambda i, w: func(i, w, *rest[0], **rest[1]))
        self._produced(weight, bias, result)

    def _norm(self, args: Sequence[Any], kwargs: Mapping[str, Any], result: Tensor) -> None:
        order = ("input", "normalized_shape", "weight", "bias")
        names = dict(zip(order, args, strict=False)) | dict(kwargs)
        self.spoil([names["input"]])
        weight, bias = (self._parameter(names.get(name)) for name in ("weight", "bias"))
        if weight is not None and weight.ndim == 1 and bias is not None:
            self._produced(weight, names["bias"], result)

    def _produced(self, weight: nn.Parameter, bias: Tensor | None, result: Tensor) -> None:
        key = weight.data_ptr()
        if key in self.found:  # its second output has to fit the same readers, so follow it as well
            link = self.found[key]
        else:
            link = self.found[key] = Link(weight, self._parameter(bias))
        self.tracked[id(result)] = result, link

    def _parameter(self, value: Tensor | None) -> nn.Parameter | None:
        """The whole parameter that a tensor is, if it is one."""
        if value is None:
            return None
        found = self.parameters.get(value.data_ptr())
        return found if found is not None and found.shape == value.shape else None

    def _pointer(self, value: Tensor) -> int | None:
        """Of the parameter that a tensor is, or is a part of."""
        if id(value) in self.views:
            return self.views[id(value)][1]
        return value.data_ptr() if value.numel() and value.data_ptr() in self.parameters else None

    def spoil(self, given: Sequence[Tensor]) -> None:
        """Something reads these that no factor can be hidden from."""
        for value in given:
            if id(value) in self.tracked:
                self.spoiled.add(self.tracked[id(value)][1].weight.data_ptr())
            elif (pointer := self._pointer(value)) is not None:
                self.used.add(pointer)


def _tensor(value: Any) -> Tensor | None:
    """The values of what a host may have wrapped with their scale and bits."""
    return next((leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)), None)
