"""Labels of fake quantizers, unique in a network, and of their calls."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from condiquant_plugin import FakeQuantizer, fake_quantizers
from condiquant_plugin.intake import check_output

CALL = re.compile(r"#\d+$")
"""What :func:`call_label` adds."""


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


def _labels(names: Mapping[str, str]) -> dict[str, str]:
    """Labels by path, none of which :func:`call_label` gives another one of them."""
    counts = Counter(names.values())
    labels: dict[str, str] = {}
    for path, name in names.items():
        label = name if name and counts[name] == 1 else path
        while CALL.search(label) or label in labels.values():
            label += "_"
        labels[path] = label
    return labels


def call_label(label: str, call: int) -> str:
    """Label of the ``call``-th use of a quantizer in one forward pass."""
    return label if call == 0 else f"{label}#{call}"


@contextmanager
def labelled_calls(model: nn.Module) -> Iterator[None]:
    """Labels are given where the simulation counts: calls of no consequence are not in the graph."""
    calls: Counter[FakeQuantizer] = Counter()
    with labelled(model) as quantizers:
        labels = {quantizer: label for label, quantizer in quantizers.items()}

        def enter(quantizer: FakeQuantizer, _inputs: tuple[Tensor, ...]) -> None:
            quantizer.name = call_label(labels[quantizer], calls[quantizer])
            calls[quantizer] += 1

        handles = [q.register_forward_pre_hook(enter) for q in quantizers.values()]
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
