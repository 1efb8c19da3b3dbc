"""Each binarized convolution alone: as in the IR, against the sums of torch on torch's tensors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import openvino as ov
import openvino.opset13 as ops
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condiquant_openvino.parity.cutting import Runner
from condiquant_openvino.parity.layers import LayerParity, largest_error
from condiquant_openvino.writing.binarization import SIGNS
from condiquant_openvino.writing.labels import labelled_convolutions
from condiquant_plugin.binary.binarizers import weight_signs
from condiquant_plugin.binary.convolution import BinarizedConv2d


@dataclass(frozen=True)
class _Seen:
    """What a convolution got and its sums, whole numbers."""

    x: Tensor
    sums: Tensor


def check_signs(model: nn.Module, ir: ov.Model, image: Tensor, runner: Runner) -> list[LayerParity]:
    """Run the signs and the convolution of every one, cut out at its input; of its first call.

    Sums of ±1 are exact in any order: what differs is a sign, a weight or the padding.
    """
    seen = _record(model, image)
    clone = ir.clone()
    nodes = {node.get_friendly_name(): node for node in clone.get_ops()}
    results = []
    for label, found in seen.items():
        signs = nodes[f"{SIGNS}/{label}"]
        parameter = ops.parameter(list(found.x.shape), np.float32)
        signs.input(0).replace_source_output(parameter.output(0))
        convolution = _convolution_behind(signs)
        piece = ov.Model([convolution.output(0)], [parameter])
        (sums,) = runner.infer(piece, [found.x.numpy()])
        error = largest_error(sums, found.sums.numpy())
        results.append(LayerParity(label, convolution.get_type_name(), error))
    return results


@torch.no_grad()
def _record(model: nn.Module, image: Tensor) -> dict[str, _Seen]:
    convolutions, seen = labelled_convolutions(model), {}

    def keep(label: str, convolution: BinarizedConv2d, x: Tensor) -> None:
        if label not in seen:
            signs, weight = convolution.binarizer(x), weight_signs(convolution.weight)
            sums = F.conv2d(signs, weight, padding=convolution.padding)
            seen[label] = _Seen(x.clone(), sums)

    handles = [
        convolution.register_forward_pre_hook(
            lambda module, inputs, label=label: keep(label, module, inputs[0])
        )
        for label, convolution in convolutions.items()
    ]
    was_training = model.training
    try:
        model.eval()(image)
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    return seen


def _convolution_behind(signs: ov.Node) -> ov.Node:
    node = signs
    while node.get_type_name() != "Convolution":
        (port,) = node.output(0).get_target_inputs()
        node = port.get_node()
    return node
