"""The torch side of a parity check: what the quantizers see, also with coarser float arithmetic."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from condiquant_openvino.parity.probe_points import Array, value_range
from condiquant_openvino.writing.labels import call_label, labelled
from condiquant_plugin import FakeQuantizer
from condiquant_plugin.intake import check_output
from condiquant_plugin.layerwise.quantized import quantized_input

_FLOAT32_BITS = 24
_PRODUCTS = {"linear", "conv2d", "conv_transpose2d", "matmul", "__matmul__", "bmm", "einsum"}
Observer = Callable[[str, Array, Array], Array | None]


@dataclass
class Record:
    """One forward pass: what the quantizers saw and gave, by label, and the output."""

    raw: dict[str, Array] = field(default_factory=dict)
    quantized: dict[str, Array] = field(default_factory=dict)
    output: NDArray[Any] = field(default_factory=lambda: torch.empty(0).numpy())


@dataclass(frozen=True)
class Rounding:
    """What coarser arithmetic does to the floats outside the quantizers."""

    results: int
    """Significant bits of what an operator gives; bfloat16 has 8, float16 11, float32 24."""
    parameters: int
    """Significant bits of parameters and buffers."""
    noise: float
    """Largest error of a product over the value range of all, on top: where terms cancel, what sums
    in another order make is not small against the result."""


def record(model: nn.Module, image: Tensor) -> Record:
    """The simulation as it is."""
    seen = Record()

    def keep(label: str, raw: Array, quantized: Array) -> None:
        # Copies: networks may change in place what a quantizer gets and gives.
        seen.raw[label], seen.quantized[label] = raw.copy(), quantized.copy()

    seen.output = simulate(model, image, keep)
    return seen


def simulate(
    model: nn.Module, image: Tensor, observe: Observer, rounding: Rounding | None = None
) -> Array:
    """Output of a forward pass in evaluation mode.

    Args:
        observe: called with label, input (transformed, where it is) and output of every quantizer; what it
            returns, if anything, goes on in place of the output.
    """
    calls = Counter[str]()
    mode = None if rounding is None else _RoundingMode(rounding, model)

    def pause(paused: bool) -> None:
        if mode is not None:
            mode.paused = paused

    def leave(quantizer: FakeQuantizer, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        label = call_label(quantizer.name, calls[quantizer.name])
        calls[quantizer.name] += 1
        (raw,) = inputs
        if quantizer.transforms or quantizer.softmax:  # by operators of floats like any other
            pause(False)
            raw = quantizer.transformed(raw)
            pause(True)
            output = quantized_input(quantizer, raw)
        replaced = observe(label, raw.numpy(), output.numpy())
        pause(False)
        # A copy: a network may change it in place.
        rounded = output if replaced is None else torch.from_numpy(replaced.copy())
        return quantizer.finished(rounded)

    was_training = model.training
    model.eval()
    with labelled(model) as quantizers, torch.no_grad():
        enabled = [quantizer for quantizer in quantizers.values() if quantizer.enabled]
        handles = [q.register_forward_pre_hook(lambda *_: pause(True)) for q in enabled]
        handles += [q.register_forward_hook(leave) for q in enabled]
        try:
            with mode or nullcontext():
                output = check_output(model, model(image))
        finally:
            for handle in handles:
                handle.remove()
            model.train(was_training)
    return output.numpy()


class _RoundingMode(TorchFunctionMode):
    """Spoils what every function gets as parameters and what it gives, unless paused."""

    def __init__(self, rounding: Rounding, model: nn.Module) -> None:
        super().__init__()
        self.paused = False
        self._buffers = {id(buffer) for buffer in model.buffers()}
        self._rounding = rounding
        self._generator = torch.Generator().manual_seed(0)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if self.paused:
            return func(*args, **(kwargs or {}))
        args, kwargs = tree_map(self._parameter, (args, kwargs or {}))
        result = func(*args, **kwargs)
        if getattr(func, "__name__", "") in _PRODUCTS:
            largest = self._rounding.noise * value_range(result.numpy())
            noise = torch.rand(result.shape, generator=self._generator)
            result = noise.mul_(2 * largest).sub_(largest).add_(result)
        # What a function passes on unchanged may be state of the model.
        return result if args and result is args[0] else tree_map(self._result, result)

    def _parameter(self, value: Any) -> Any:
        is_parameter = isinstance(value, nn.Parameter) or id(value) in self._buffers
        return _round(value, self._rounding.parameters) if is_parameter else value

    def _result(self, value: Any) -> Any:
        # A copy of a view would cut what is written to it off from its base, which is rounded already.
        is_new = isinstance(value, Tensor) and not value._is_view()
        return _round(value, self._rounding.results) if is_new else value


def _round(x: Tensor, bits: int) -> Tensor:
    """Nearest values of ``bits`` significant bits, ties away from zero."""
    dropped = _FLOAT32_BITS - bits
    if x.dtype != torch.float32 or dropped <= 0:
        return x
    integers = x.view(torch.int32) + (1 << (dropped - 1))
    return integers.bitwise_and_(-(1 << dropped)).view(torch.float32)
