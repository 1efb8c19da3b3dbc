"""Names for what quantizes and binarizes, unique in a network, while it is traced or simulated."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from condiquant_plugin import FakeQuantizer, fake_quantizers
from condiquant_plugin.binary.convolution import BinarizedConv2d, binarized_convolutions
from condiquant_plugin.intake import check_output

_CALL = re.compile(r"#\d+$")


@contextmanager
def labelled(model: nn.Module) -> Iterator[dict[str, FakeQuantizer]]:
    """Fake quantizers by a label unique in ``model``: the name, else the module path."""
    found = fake_quantizers(model)
    names = {path: quantizer.name for path, quantizer in found.items()}
    labels = _labels(names)
    try:
        for path, quantizer in found.items():
            quantizer.name = labels[path]
        yield {labels[path]: quantizer for path, quantizer in found.items()}
    finally:
        for path, quantizer in found.items():
            quantizer.name = names[path]


@contextmanager
def _named_convolutions(model: nn.Module) -> Iterator[dict[str, BinarizedConv2d]]:
    found = labelled_convolutions(model)
    try:
        yield found
    finally:
        for convolution in found.values():
            convolution.name = ""


def labelled_convolutions(model: nn.Module) -> dict[str, BinarizedConv2d]:
    """Binarized convolutions by their label, the module path."""
    return {path or "convolution": m for path, m in binarized_convolutions(model).items()}


def _labels(names: Mapping[str, str]) -> dict[str, str]:
    """Labels by path, none of which :func:`call_label` gives another one of them."""
    counts = Counter(names.values())
    labels: dict[str, str] = {}
    for path, name in names.items():
        label = name if name and counts[name] == 1 else path
        while _CALL.search(label) or label in labels.values():
            label += "_"
        labels[path] = label
    return labels


def call_label(label: str, call: int) -> str:
    """Label of the ``call``-th use of a quantizer in one forward pass."""
    return label if call == 0 else f"{label}#{call}"


@contextmanager
def labelled_calls(model: nn.Module) -> Iterator[None]:
    """Labels are given where the simulation counts: calls of no consequence are not in the graph."""
    calls: Counter[nn.Module] = Counter()
    with labelled(model) as quantizers, _named_convolutions(model) as convolutions:
        labels: dict[Any, str] = {module: label for label, module in quantizers.items()}
        labels |= {module: label for label, module in convolutions.items()}

        def enter(quantizer: Any, _inputs: tuple[Tensor, ...]) -> None:
            quantizer.name = call_label(labels[quantizer], calls[quantizer])
            calls[quantizer] += 1

        handles = [module.register_forward_pre_hook(enter) for module in labels]
        # A tracer reads parametrized weights before the forward pass.
        handles.append(model.register_forward_pre_hook(lambda *_: calls.clear()))
        try:
            handles.append(
                model.register_forward_hook(lambda m, _, output: check_output(m, output))
            )
            yield
        finally:
            for handle in handles:
                handle.remove()


def without_call(label: str) -> str:
    """Inverse of :func:`call_label`."""
    return _CALL.sub("", label)
