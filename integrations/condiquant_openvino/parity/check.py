"""Does the IR compute what torch simulates? Layer by layer, stretch by stretch, and end to end.

A value on the tie between two codes may round either way: another order of float32 sums is enough.
With global attention one such flip changes codes everywhere: torch on two inputs 1e-7 apart can end
1 % apart. Hence the comparison in stretches that start from the tensors that torch saw at some of the
quantizers.

What rounding may come to differs from network to network, so torch measures it: the simulation runs
again with the result of every operator outside the quantizers rounded: to the 8 significant bits of
bfloat16, at most 2**-8 off, where the device computes in it, else to 16, the 2**-16 that long float32
sums may be off; and with as much noise on products as float32 leaves where terms cancel, which decides
exact ties. The IR may differ by ``ROOM`` times as much, or by the strict tolerances if they are more.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import openvino as ov
import torch
from torch import Tensor, nn

from condiquant_openvino.parity.bisection import find_first_difference
from condiquant_openvino.parity.cutting import OUTPUT, Runner, cut_sets
from condiquant_openvino.parity.example import (
    LAYER_TOLERANCE,
    ROOM,
    TIE_TOLERANCE,
    Example,
    Figures,
    tolerance,
)
from condiquant_openvino.parity.layers import F32, check_layers
from condiquant_openvino.parity.outcome import InputParity, Parity
from condiquant_openvino.parity.signs import check_signs
from condiquant_openvino.parity.simulation import Rounding
from condiquant_openvino.running.instruction_sets import (
    lower_instruction_sets,
    run_with,
    sums_saturate,
    without_mvn,
)
from condiquant_openvino.running.reading import core_of_process, read_ir, read_metadata
from condiquant_openvino.writing.overflow import largest_pair_sums
from condiquant_plugin import InputError
from condiquant_plugin.intake import check_is_float32
from condiquant_plugin.uniform import grid

PROPERTIES: Mapping[str, Mapping[str, Any]] = {
    "f32": F32,
    "accuracy": {"EXECUTION_MODE_HINT": "ACCURACY"},
    "default": {},
}
"""What an IR is checked with; bfloat16 is the default of CPUs that have it."""
_LOWERED = "f32"
"""Of ``PROPERTIES``, what is checked with lower instruction sets too."""
_OF_KERNELS = ("layerType", "primitiveType", "runtimePrecision", "outputPrecisions")
_SIGNIFICANT_BITS = {"bf16": 8, "f16": 11}
_FLOAT32_SUM_BITS = 16
_CANCELLATION = 2.0**-22


@dataclass(frozen=True)
class _Allowance:
    """What rounding does to torch, and may do to an IR."""

    cuts: list[list[tuple[list[str], dict[str, float]]]]
    """For every example the sets of cuts, and at each place the tolerance."""
    end_to_end: float
    ties: float
    layers: float
    precision: str
    rounding: Rounding


def check_parity(
    model: nn.Module,
    ov_model_or_path: ov.Model | str | os.PathLike[str],
    inputs: Sequence[Tensor],
    *,
    max_layers: int | None = None,
    device: str = "CPU",
    properties: Mapping[str, Any] = F32,
) -> Parity:
    """Compare a model with fake quantizers and its IR.

    Keeps every quantized tensor of a forward pass in memory: give small inputs, such as 64x64. An IR
    whose float parameters are in half precision may differ from ``model`` by what their rounding costs.

    Args:
        inputs: at least one, shape ``(1, channels, height, width)``; a static IR needs its own
            shape. The layers are checked on the first.
        max_layers: check that many layers, evenly spread; all by default, 0 for none.
        properties: to compile with, all others at their defaults; ``{}`` for the plugin's own
            choice, which is bfloat16 for float operators on CPUs that have it.

    Raises:
        InputError: if the path is no IR, or the model is not float32 with one output.
    """
    ir = ov_model_or_path if isinstance(ov_model_or_path, ov.Model) else read_ir(ov_model_or_path)
    check_is_float32(model)
    examples = [Example(model, ir, image.float(), device) for image in inputs]
    runner = Runner(device, properties)
    network = runner.compile(ir)
    allowance = _allowance(ir, network, examples)
    return _parity(ir, network, examples, runner, allowance, model, max_layers)


def check_parities(
    model: nn.Module, ir: ov.Model, inputs: Sequence[Tensor], *, device: str = "CPU"
) -> dict[str, Parity]:
    """Parity by name of ``PROPERTIES``, up to the first that is broken.

    In ``f32`` as :func:`check_parity` has it, and on the first input again with every lower instruction
    set that the CPU has, by their names; with the others without layers and flipped codes.

    Raises:
        InputError: as :func:`check_parity`.
    """
    lower_sets = lower_instruction_sets() if device == "CPU" and _overflow(ir) == "safe" else []
    with _cores_left(1 if lower_sets else 0):
        return _checked_with(lower_sets, model, ir, inputs, device)


@contextmanager
def _cores_left(count: int) -> Iterator[None]:
    """For others: threads of torch wait busily, and with fewer cores than threads mostly for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(threads - count, 1))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _checked_with(
    lower_sets: Sequence[str], model: nn.Module, ir: ov.Model, inputs: Sequence[Tensor], device: str
) -> dict[str, Parity]:
    examples = [Example(model, ir, image, device) for image in inputs]
    parities: dict[str, Parity] = {}
    checked: dict[_Program, Parity] = {}
    with TemporaryDirectory() as folder, ThreadPoolExecutor(1) as beside:
        lowered: dict[str, Future[Parity]] = {}
        for name, properties in PROPERTIES.items():
            in_full = name == _LOWERED
            runner = Runner(device, properties)
            network = runner.compile(ir)
            program = _Program.of(network, examples)
            if program in checked:
                parities[name] = replace(checked[program], properties=properties)
                continue
            allowance = _allowance(ir, network, examples)
            if in_full and lower_sets:
                # In processes, one at a time, while this one goes on.
                path, recorded = Path(folder) / "model.xml", [examples[0].recorded()]
                ov.save_model(ir, path, compress_to_fp16=False)
                job = partial(_parity_with, path, recorded, runner, allowance)
                lowered = {each: beside.submit(job, each) for each in lower_sets}
            parity = _parity(
                ir, network, examples, runner, allowance, model, None if in_full else 0, in_full
            )
            checked[program] = parities[name] = parity
            if not parity.ok:
                for future in lowered.values():
                    future.cancel()
                break
        if not parities[_LOWERED].ok:
            lowered = {}
        found = {each: f.result() for each, f in lowered.items() if not f.cancelled()}
    in_f32 = {_LOWERED: parities.pop(_LOWERED)}
    kept: dict[str, Parity] = {}
    for name, parity in (in_f32 | found | parities).items():
        kept[name] = parity
        if not parity.ok:
            break
    return kept


@dataclass(frozen=True)
class _Program:
    """What a device runs for an IR; two that are equal compute the same, and need one check."""

    kernels: tuple[tuple[str, ...], ...]
    outputs: tuple[bytes, ...]
    """Digests, by example."""

    @classmethod
    def of(cls, network: ov.CompiledModel, examples: Sequence[Example]) -> _Program:
        # Names hold a counter of the whole process.
        kernels = sorted(
            tuple(node.get_rt_info()[key].astype(str) for key in _OF_KERNELS)
            for node in network.get_runtime_model().get_ops()
        )
        outputs = (sha256(network([example.image])[0]).digest() for example in examples)
        return cls(tuple(kernels), tuple(outputs))


def _parity(
    ir: ov.Model,
    network: ov.CompiledModel,
    examples: Sequence[Example],
    runner: Runner,
    allowance: _Allowance,
    model: nn.Module,
    max_layers: int | None,
    with_codes: bool = True,
) -> Parity:
    parity = _measured(ir, network, examples, runner, allowance, max_layers, with_codes)
    if max_layers != 0:
        binarized = check_signs(model, ir, examples[0].tensor, runner)
        parity = replace(parity, layers=[*parity.layers, *binarized[:max_layers]])
    images = [example.tensor for example in examples]
    bisect = partial(find_first_difference, model, ir, images, runner, allowance.rounding)
    sums = largest_pair_sums(ir) if _overflow(ir) == "safe" else {}
    most = max(sums.items(), key=lambda item: item[1], default=("", 0))
    return replace(parity, bisect=bisect, largest_pair_sum=most)


def _overflow(ir: ov.Model) -> str:
    return str(read_metadata(ir).get("overflow", grid.DEFAULT_OVERFLOW))


def _parity_with(
    path: Path,
    recorded: Sequence[Example],
    runner: Runner,
    allowance: _Allowance,
    instruction_set: str,
) -> Parity:
    parity = run_with(instruction_set, _measured_file, path, recorded, runner, allowance)
    return replace(parity, instruction_set=instruction_set)


def _measured_file(
    path: Path, recorded: Sequence[Example], runner: Runner, allowance: _Allowance
) -> Parity:
    ir = core_of_process().read_model(path)
    without_mvn(ir)
    examples = [example.on(ir) for example in recorded]
    network = runner.compile(ir)
    return _measured(ir, network, examples, runner, allowance, None, with_codes=False)


def _allowance(ir: ov.Model, network: ov.CompiledModel, examples: Sequence[Example]) -> _Allowance:
    if _overflow(ir) == "vnni" and sums_saturate():
        raise InputError(
            "the IR is for CPUs with VNNI (overflow=vnni), and this one has none: check it on one that "
            "has, or quantize with overflow=safe"
        )
    precision = str(network.get_property("INFERENCE_PRECISION_HINT").get_type_name())
    rounding = _rounding(ir, precision)
    whole, shortest = Figures(), Figures()
    cuts = []
    for example in examples:
        whole.add(example.rounded((), rounding))
        sets = cut_sets(ir, example.probe_points)
        by_rounding = [example.rounded(places, rounding) for places in sets]
        cuts.append([(c, f.tolerances()) for c, f in zip(sets, by_rounding, strict=True)])
        shortest.add(by_rounding[-1])
    in_float = precision not in _SIGNIFICANT_BITS
    return _Allowance(
        cuts,
        end_to_end=whole.tolerances()[OUTPUT],
        ties=tolerance(TIE_TOLERANCE, shortest.flip_rate),
        layers=LAYER_TOLERANCE if in_float else ROOM * 2.0**-rounding.results,
        precision="f32" if in_float else precision,
        rounding=rounding,
    )


def _measured(
    ir: ov.Model,
    network: ov.CompiledModel,
    examples: Sequence[Example],
    runner: Runner,
    allowance: _Allowance,
    max_layers: int | None,
    with_codes: bool,
) -> Parity:
    free, shortest, codes = Figures(), Figures(), Figures()
    found: dict[str, list[InputParity]] = defaultdict(list)
    keeping = runner.keeping()
    for example, sets in zip(examples, allowance.cuts, strict=False):
        free.add(example.from_image(network))
        for cuts, tolerances in sets:
            by_ir = example.between(cuts, keeping, tolerances)
            for place, error in by_ir.inputs.items():
                found[place].append(InputParity(place, error, tolerances[place]))
        shortest.add(by_ir)
        if with_codes:
            codes.add(example.codes_from_image(keeping))
    places = [*(point.label for point in examples[0].probe_points), OUTPUT]
    return Parity(
        mean_abs=free.mean_abs,
        max_abs=free.max_abs,
        code_flip_rate=codes.flip_rate if with_codes else None,
        stretch_mean_abs=shortest.mean_abs,
        stretch_max_abs=shortest.max_abs,
        tie_rate=shortest.flip_rate,
        inputs=[max(found[place], key=lambda e: e.error / e.tolerance) for place in places],
        layers=[] if max_layers == 0 else check_layers(ir, examples[0], runner, max_layers),
        properties=runner.properties,
        precision=allowance.precision,
        end_to_end_tolerance=allowance.end_to_end,
        tie_tolerance=allowance.ties,
        layer_tolerance=allowance.layers,
    )


def _rounding(ir: ov.Model, precision: str) -> Rounding:
    results = _SIGNIFICANT_BITS.get(precision, _FLOAT32_SUM_BITS)
    halved = any(
        node.get_type_name() == "Constant" and node.get_output_element_type(0) == ov.Type.f16
        for node in ir.get_ops()
    )
    parameters = min(results, _SIGNIFICANT_BITS["f16"]) if halved else results
    return Rounding(results, parameters, _CANCELLATION)
