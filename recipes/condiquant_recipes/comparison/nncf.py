"""NNCF's own methods on the float IR, and CondiQuant in front of its int8."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import copy
from functools import partial
from itertools import count
from typing import Any

import nncf
import numpy as np
import openvino as ov
from nncf.common.graph.graph import NNCFGraph
from nncf.common.quantization.quantizer_setup import SingleConfigQuantizerSetup
from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, OverflowFix
from nncf.quantization.algorithms.min_max.algorithm import MinMaxQuantization
from nncf.quantization.algorithms.pipeline import Pipeline
from nncf.quantization.algorithms.post_training.pipeline import create_ptq_pipeline
from numpy.typing import NDArray
from openvino._offline_transformations import compress_quantize_weights_transformation

import condiquant_nncf as nncf_host
from condiquant_nncf.backends.openvino import prepare
from condiquant_plugin.errors import InputError
from condiquant_plugin.layerwise.precision import LayerBits
from condiquant_plugin.layerwise.problem import LayerReport
from condiquant_plugin.uniform.bits import FLOAT_BITS
from condiquant_recipes import settings
from condiquant_recipes.comparison.job import Calibrated, Contender, Job


def _copy_and_ignored(
    job: Job, *, split_attention: bool = False, graph: ov.Model | None = None
) -> tuple[ov.Model, nncf.IgnoredScope | None]:
    """A copy of the float IR, and the recipe's ``ignored_scope``, which names nodes of torch, for it."""
    model = prepare(job.float_ir if graph is None else graph, split_attention=split_attention)
    section = settings.quantization(job.recipe)
    if section.ignored_scope is None:
        return model, None
    wrapped = nncf_host.wrap(job.source.network, job.source.crops[:1])
    find = partial(nncf_host.find_layers, scope=section.scope, others=True)
    kept = {layer.node.node_name for layer in find(wrapped, ignored_scope=section.ignored_scope)}
    nodes = _nodes(find(model))
    ignored = [
        nodes[key]
        for key, node in _nodes(find(wrapped)).items()
        if node not in kept and key in nodes
    ]
    return model, nncf.IgnoredScope(names=ignored) if ignored else None


def _nodes(layers: Iterable[nncf_host.Layer]) -> dict[str, str]:
    """Node names by what torch and OpenVINO share: modules, and the order of products."""
    products = count()
    return {
        layer.name if layer.weight_name is not None else f"product {next(products)}": (
            layer.node.node_name
        )
        for layer in layers
    }


def int8_contenders() -> list[Contender]:
    preset = nncf.QuantizationPreset
    transformer = nncf.ModelType.TRANSFORMER
    rows: list[tuple[str, str, dict[str, Any]]] = [
        ("performance", "PERFORMANCE", {"preset": preset.PERFORMANCE}),
        ("mixed", "MIXED", {"preset": preset.MIXED}),
        (
            "mixed-full-bias",
            "MIXED, full bias correction",
            {"preset": preset.MIXED, "fast_bias_correction": False},
        ),
        ("transformer", "TRANSFORMER, SmoothQuant", {"model_type": transformer}),
    ]
    methods = [
        Contender(
            f"nncf-int8-{n}", f"NNCF int8 {label}", "nncf-int8", LayerBits(8, 8), int8(options)
        )
        for n, label, options in rows
    ]
    controlled = Contender(
        "nncf-int8-accuracy-control",
        "NNCF int8, accuracy control",
        "nncf-int8",
        LayerBits(8, 8),
        _accuracy_control,
    )
    return [*methods, controlled]


def int8(
    options: dict[str, Any], graph: Callable[[Job], ov.Model] = lambda job: job.float_ir
) -> Callable[[Job], Calibrated]:
    """NNCF's post-training quantization with some options, of a graph of the float network."""

    def calibrate(job: Job) -> Calibrated:
        model, ignored = _copy_and_ignored(job, graph=graph(job))
        quantized = nncf.quantize(
            model,
            job.dataset(),
            subset_size=len(job.source.crops),
            ignored_scope=ignored,
            **options,
        )
        smooths = options.get("model_type") is nncf.ModelType.TRANSFORMER
        notes = []
        if smooths and not _multiplies_constants(job.float_ir):
            notes = ["NNCF's SmoothQuant smooths matrix products only: there is none with a weight"]
        return Calibrated(quantized, notes=notes)

    return calibrate


def _accuracy_control(job: Job) -> Calibrated:
    """NNCF reverts layers until its default ``max_drop``, 0.01 of the metric, is met.

    The metric is one minus the root mean square error against the float output, on the held-out
    calibration crops: 0.01 are 40 dB. No test image is seen.
    """
    crops = [crop[None].numpy() for crop in job.source.held_out]
    reference = ov.compile_model(job.float_ir, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    pairs = [(crop, reference(crop)[0]) for crop in crops]

    def validate(
        model: Any, items: Iterable[tuple[NDArray[np.float32], NDArray[np.float32]]]
    ) -> tuple[float, list[float]]:
        scores = [1 - float(np.sqrt(np.square(model(x)[0] - y).mean())) for x, y in items]
        return float(np.mean(scores)), scores

    model, ignored = _copy_and_ignored(job)
    model = nncf.quantize_with_accuracy_control(
        model,
        job.dataset(),
        nncf.Dataset(pairs, lambda pair: pair[0]),
        validate,
        subset_size=len(job.source.crops),
        model_type=job.model_type,
        ignored_scope=ignored,
    )
    notes = ["accuracy control keeps a fidelity of 40 dB on the held-out calibration crops"]
    if not any(node.get_type_name() == "FakeQuantize" for node in model.get_ops()):
        notes.append("accuracy control reverted every layer to float")
    return Calibrated(model, notes=notes)


def weight_contenders() -> list[Contender]:
    mode = nncf.CompressWeightsMode
    by_data: list[tuple[str, str, dict[str, bool]]] = [
        ("", "", {}),
        ("-awq", ", AWQ + scale estimation", {"awq": True, "scale_estimation": True}),
        ("-gptq", ", GPTQ", {"gptq": True}),
    ]
    methods = [
        Contender(
            "nncf-weights-int8-asym",
            "NNCF weights INT8_ASYM",
            "nncf-weights",
            LayerBits(8, FLOAT_BITS),
            partial(_compress, mode=mode.INT8_ASYM),
        )
    ]
    for four_bits in (mode.INT4_SYM, mode.INT4_ASYM, mode.NF4):
        for suffix, label, options in by_data:
            methods.append(
                Contender(
                    f"nncf-weights-{four_bits.name.lower().replace('_', '-')}{suffix}",
                    f"NNCF weights {four_bits.name}{label}",
                    "nncf-weights",
                    LayerBits(4, FLOAT_BITS),
                    partial(_compress_to_four_bits, mode=four_bits, options=options),
                )
            )
    return methods


def _compress(job: Job, **options: Any) -> Calibrated:
    model, ignored = _copy_and_ignored(job)
    return Calibrated(nncf.compress_weights(model, ignored_scope=ignored, **options))


def _compress_to_four_bits(
    job: Job, *, mode: nncf.CompressWeightsMode, options: dict[str, bool]
) -> Calibrated:
    """Groups are whole rows, which divide any number of channels."""
    if options and not _multiplies_constants(job.float_ir):
        raise InputError(
            f"does not apply: {' + '.join(options)} is for weights of matrix products, "
            "and the network has convolutions only"
        )
    compressed = _compress(
        job,
        mode=mode,
        group_size=-1,
        all_layers=True,
        dataset=job.dataset() if options else None,
        subset_size=len(job.source.crops),
        **options,
    )
    if _multiplies_constants(job.float_ir):
        return compressed
    notes = ["NNCF keeps weights of convolutions at 8 bits: none has 4"]
    return Calibrated(compressed.model, notes=notes, weight_bits=8)


def _multiplies_constants(model: ov.Model) -> bool:
    """Whether a matrix product has a constant operand."""
    return any(
        node.get_type_name() == "MatMul"
        and any(value.get_node().get_type_name() == "Constant" for value in node.input_values())
        for node in model.get_ops()
    )


class _LowBitMinMax(MinMaxQuantization):
    """NNCF's MinMax with layers at bit-widths that its hardware configurations refuse.

    A setup from elsewhere is how NNCF's own ``quantize_pt2e`` takes other quantizers
    (``OpenVINOQuantizerAdapter.get_quantization_setup``). Placement, granularity and symmetry stay
    NNCF's, and so do 8 bits of what has no layer in scope behind it.
    """

    def __init__(
        self, weight_bits: int, activation_bits: int, layers: set[str], **options: Any
    ) -> None:
        super().__init__(**options)
        self._bits, self._layers = (weight_bits, activation_bits), layers
        self.shared: set[str] = set()
        """Nodes outside ``layers`` that NNCF gives the quantizer of one."""

    def find_quantization_setup(
        self, model: Any, nncf_graph: NNCFGraph
    ) -> SingleConfigQuantizerSetup:
        setup = super().find_quantization_setup(model, nncf_graph)
        for point in setup.quantization_points.values():
            quantized = set(point.directly_quantized_operator_node_names)
            if self._layers.isdisjoint(quantized):
                continue
            self.shared |= quantized - self._layers
            point.qconfig = copy(point.qconfig)
            point.qconfig.num_bits = self._bits[0 if point.is_weight_quantization_point() else 1]
        return setup


def minmax(job: Job, weight_bits: int, activation_bits: int) -> Calibrated:
    """NNCF's stock pipeline, bias correction included, with only the bits of layers in scope changed."""
    common: dict[str, Any] = {
        "preset": nncf.QuantizationPreset.MIXED,
        "subset_size": len(job.source.crops),
        "model_type": job.model_type,
    }
    model, ignored = _copy_and_ignored(job, split_attention=True)
    common["ignored_scope"] = ignored
    scope = job.recipe.condiquant.scope
    layers = {layer.node.node_name for layer in nncf_host.find_layers(model, scope, ignored)}
    overflow_fix = OverflowFix.DISABLE
    stock = create_ptq_pipeline(
        **common, advanced_parameters=AdvancedQuantizationParameters(overflow_fix=overflow_fix)
    )
    forced = _LowBitMinMax(
        weight_bits, activation_bits, layers, **common, overflow_fix=overflow_fix
    )
    steps = [
        [forced if isinstance(algorithm, MinMaxQuantization) else algorithm for algorithm in step]
        for step in stock.pipeline_steps
    ]
    model = Pipeline(steps).run(model, job.dataset())
    compress_quantize_weights_transformation(model)
    notes = ["what NNCF quantizes outside the scope has 8 bits"]
    if forced.shared:
        notes.append(
            f"NNCF has one quantizer for a layer in scope and other operators, which have its "
            f"bits too: {len(forced.shared)} of them, residual additions among others"
        )
    return Calibrated(model, notes=notes)


def condiquant_int8(job: Job) -> Calibrated:
    """CondiQuant inside NNCF, before its int8 pipeline."""
    reports: list[LayerReport] = []
    model, ignored = _copy_and_ignored(job)
    quantized = nncf_host.quantize(
        model,
        job.dataset(),
        subset_size=len(job.source.crops),
        model_type=job.model_type,
        ignored_scope=ignored,
        then="minmax",
        reports=reports,
    )
    return Calibrated(quantized, layers=reports)
