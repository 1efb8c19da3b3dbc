"""Does the IR compute what torch simulates? Layer by layer, stretch by stretch, and end to end.

A value on the tie between two codes may round either way: another order of float32 sums is enough.
With global attention one such flip changes codes everywhere: torch on two inputs 1e-7 apart can end
1 % apart. Hence the comparison stretch by stretch: each part between quantizers starts from the
tensors that torch saw.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import openvino as ov
import torch
from torch import Tensor, nn

from condiquant_openvino.conversion import call_label, labelled
from condiquant_openvino.cutting import Pieces, entry_tensors, quantized_tensors
from condiquant_openvino.layer_parity import LayerParity, check_layers, value_range
from condiquant_openvino.saving import read_ir
from condiquant_openvino.sites import Array, Arrays, Site, locate
from condiquant_openvino.upscaling import compile_ir
from condiquant_plugin import FakeQuantizer

LAYER_TOLERANCE, END_TO_END_TOLERANCE, TIE_TOLERANCE = 1e-5, 1e-4, 1e-4


@dataclass(frozen=True)
class Parity:
    """Differences relative to the value range of what torch computes."""

    mean_abs: float
    """End to end, mean over all inputs."""
    max_abs: float
    """End to end, maximum over all inputs."""
    code_flip_rate: float
    """Share of the codes of all activation quantizers that differ, end to end."""
    stretch_mean_abs: float
    """As ``mean_abs``, with the tensors torch saw put in at every activation quantizer."""
    stretch_max_abs: float
    """As ``max_abs``, likewise."""
    tie_rate: float
    """As ``code_flip_rate``, likewise: only ties are left of it."""
    layers: list[LayerParity] = field(default_factory=list)
    """Every quantized product checked, on the first input."""
    layer_tolerance: float = LAYER_TOLERANCE
    end_to_end_tolerance: float = END_TO_END_TOLERANCE
    tie_tolerance: float = TIE_TOLERANCE

    @property
    def ok(self) -> bool:
        """Whether every layer agrees, and the whole up to rounding ties."""
        return self.complaint() is None

    def complaint(self) -> str | None:
        """What is wrong, naming the first bad layer; None if nothing is."""
        for layer in self.layers:
            if not layer.error <= self.layer_tolerance:
                return (
                    f"the IR differs from the simulation in {layer.name}: {layer.error:.1e} of the "
                    f"value range, allowed {self.layer_tolerance:.0e}"
                )
        if self.mean_abs <= self.end_to_end_tolerance:
            return None
        if not self.stretch_mean_abs <= self.end_to_end_tolerance:
            return (
                f"the IR differs from the simulation end to end: mean {self.mean_abs:.1e} of the "
                f"value range, {self.stretch_mean_abs:.1e} with torch's tensors at the quantizers, "
                f"allowed {self.end_to_end_tolerance:.0e}"
            )
        if not self.tie_rate <= self.tie_tolerance:
            return (
                f"the IR rounds {self.tie_rate:.1e} of all codes otherwise than the simulation, "
                f"allowed {self.tie_tolerance:.0e}"
            )
        return None

    def raise_if_broken(self) -> None:
        """Raises RuntimeError with the complaint, if there is one."""
        if (complaint := self.complaint()) is not None:
            raise RuntimeError(complaint)


@dataclass
class _Record:
    """What one forward pass of torch saw and computed at its quantizers, by label."""

    raw: dict[str, Array] = field(default_factory=dict)
    quantized: dict[str, Array] = field(default_factory=dict)

    def arrange(self, sites: Sequence[Site]) -> None:
        """Bring the tensors into the order of the IR's exits."""
        for site in sites:
            for tensors in (self.raw, self.quantized):
                tensors[site.label] = site.from_network(tensors[site.label])


def check_parity(
    model: nn.Module,
    ov_model_or_path: ov.Model | str | os.PathLike[str],
    inputs: Sequence[Tensor],
    *,
    max_layers: int | None = None,
    device: str = "CPU",
    layer_tolerance: float = LAYER_TOLERANCE,
    end_to_end_tolerance: float = END_TO_END_TOLERANCE,
) -> Parity:
    """Compare a model with fake quantizers and its IR, compiled at default properties plus f32.

    Keeps every quantized tensor of a forward pass in memory: give small inputs, such as 64x64.

    Args:
        inputs: at least one, shape ``(1, channels, height, width)``; a static IR needs its own
            shape. The layers are checked on the first.
        max_layers: check that many layers, evenly spread; all by default, 0 for none.

    Raises:
        InputError: if the path is no IR.
    """
    ir = ov_model_or_path if isinstance(ov_model_or_path, ov.Model) else read_ir(ov_model_or_path)
    network = compile_ir(ir, device)
    free, stretches = _Differences(), _Differences()
    layers: list[LayerParity] = []
    was_training = model.training
    model.eval()
    try:
        for index, tensor in enumerate(inputs):
            image = tensor.numpy()
            with torch.no_grad(), _recording(model) as record:
                expected = model(tensor).numpy()
            sites = locate(ir, image, device)
            record.arrange(sites)
            found = quantized_tensors(ir, sites, image, device)
            codes = {site.label: site.codes(found[site.label]) for site in sites}
            free.add(network([image])[0], expected, codes, record.quantized, sites)
            clear = {
                s.label: s.away_from_ties(record.raw[s.label], record.quantized[s.label])
                for s in sites
            }
            entries = entry_tensors(sites, clear)
            output, arrived = Pieces(ir, entries).run_stretches(image, device)
            codes = {site.label: site.codes_at_entry(arrived[site.entry]) for site in sites}
            stretches.add(output, expected, codes, record.quantized, sites)
            if index == 0 and max_layers != 0:
                exits = {site.exit: record.quantized[site.label] for site in sites}
                activations = {site.label for site in sites}
                weights = {n: w for n, w in record.quantized.items() if n not in activations}
                layers = check_layers(ir, image, entries, exits, weights, max_layers, device)
    finally:
        model.train(was_training)
    return Parity(
        *free.summary(),
        *stretches.summary(),
        layers=layers,
        layer_tolerance=layer_tolerance,
        end_to_end_tolerance=end_to_end_tolerance,
    )


@dataclass
class _Differences:
    mean_abs: list[float] = field(default_factory=list)
    max_abs: float = 0.0
    flips: int = 0
    codes: int = 0

    def add(
        self,
        output: Array,
        expected: Array,
        codes: Arrays,
        quantized: Arrays,
        sites: Sequence[Site],
    ) -> None:
        difference = np.abs(output - expected) / value_range(expected)
        self.mean_abs.append(float(difference.mean()))
        self.max_abs = max(self.max_abs, float(difference.max()))
        for site in sites:
            differing = codes[site.label] != site.codes(quantized[site.label])
            self.flips += int(np.count_nonzero(differing))
            self.codes += differing.size

    def summary(self) -> tuple[float, float, float]:
        return float(np.mean(self.mean_abs)), self.max_abs, self.flips / max(self.codes, 1)


@contextmanager
def _recording(model: nn.Module) -> Iterator[_Record]:
    record, calls = _Record(), Counter[str]()

    def hook(quantizer: FakeQuantizer, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        label = call_label(quantizer.name, calls[quantizer.name])
        calls[quantizer.name] += 1
        record.raw[label], record.quantized[label] = inputs[0].numpy(), output.numpy()

    with labelled(model) as quantizers:
        handles = [q.register_forward_hook(hook) for q in quantizers.values() if q.enabled]
        try:
            yield record
        finally:
            for handle in handles:
                handle.remove()
