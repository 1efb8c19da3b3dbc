"""8-bit images in and out: what cameras and files hold, instead of float tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import openvino as ov
import openvino.opset13 as ops
from numpy.typing import NDArray
from openvino.preprocess import PrePostProcessor

from condiquant_openvino.running.upscaling import compile_ir
from condiquant_plugin import InputError

_NCHW, _NHWC = ov.Layout("NCHW"), ov.Layout("NHWC")
_ENTERS, _LEAVES = "u8_nhwc/image", "u8_nhwc/grey_levels"


def take_u8_nhwc(model: ov.Model) -> ov.Model:
    """A copy that takes and gives 8-bit images; static and dynamic sizes stay as they are.

    The steps are OpenVINO's PrePostProcessor's. They are built apart from the network, because its
    ``build`` folds the constants of the model it is given: packed weights would be stored as int8.

    Args:
        model: takes and gives float32 images of shape ``(1, 3, height, width)``, RGB in [0, 1].

    Returns:
        Takes u8 of shape ``(1, height, width, 3)``, RGB, and gives the same: the float output times
        255, rounded (half to even), clamped to 0 ... 255.

    Raises:
        InputError: if the model takes or gives anything else.
    """
    ports = [*model.inputs, *model.outputs]
    if len(ports) != 2 or not all(_is_image(port) for port in ports):
        found = ", ".join(
            f"{port.get_element_type().get_type_name()}{port.get_partial_shape()}" for port in ports
        )
        raise InputError(f"u8_nhwc needs one f32[1,3,?,?] in and one out, not {found}")
    network = model.clone()
    parameter, result = network.get_parameters()[0], network.get_results()[0]
    names = network.input().get_names(), network.output().get_names()
    before, after = _before(network.input()), _after(network.output())
    for label, steps in (("in", before), ("out", after)):
        for index, node in enumerate(steps.get_ordered_ops()):
            node.set_friendly_name(f"u8_nhwc/{label}/{node.get_type_name()}_{index}")
    enters = before.get_results()[0].input_value(0)
    enters.get_node().set_friendly_name(_ENTERS)
    for port in parameter.output(0).get_target_inputs():
        port.replace_source_output(enters)
    for port in after.get_parameters()[0].output(0).get_target_inputs():
        port.get_node().set_friendly_name(_LEAVES)
        port.replace_source_output(result.input_value(0))
    result.input_value(0).get_tensor().set_names(set())
    network.add_parameters(before.get_parameters())
    network.remove_parameter(parameter)
    network.add_results(after.get_results())
    network.remove_result(result)
    network.validate_nodes_and_infer_types()
    network.input().get_tensor().set_names(names[0])
    network.output().get_tensor().set_names(names[1])
    for new, old in ((network.get_parameters()[0], parameter), (network.get_results()[0], result)):
        new.set_friendly_name(old.get_friendly_name())
    return network


def _is_image(port: ov.Output) -> bool:
    return bool(
        port.get_element_type() == ov.Type.f32
        and port.get_partial_shape().compatible(ov.PartialShape([1, 3, -1, -1]))
    )


def _before(port: ov.Output) -> ov.Model:
    """u8 NHWC to what the network takes."""
    steps = PrePostProcessor(_identity(port))
    steps.input().tensor().set_element_type(ov.Type.u8).set_layout(_NHWC)
    steps.input().preprocess().convert_element_type(ov.Type.f32).scale(255.0)
    steps.input().model().set_layout(_NCHW)
    return steps.build()


def _after(port: ov.Output) -> ov.Model:
    """What the network gives to u8 NHWC."""

    def grey_levels(image: ov.Output) -> ov.Output:
        scaled = ops.multiply(image, ops.constant(np.float32(255)))
        return ops.clamp(ops.round(scaled, "half_to_even"), 0.0, 255.0).output(0)

    steps = PrePostProcessor(_identity(port))
    steps.output().model().set_layout(_NCHW)
    steps.output().postprocess().custom(grey_levels)
    steps.output().tensor().set_layout(_NHWC).set_element_type(ov.Type.u8)
    return steps.build()


def _identity(port: ov.Output) -> ov.Model:
    parameter = ops.parameter(port.get_partial_shape(), port.get_element_type())
    return ov.Model([parameter], [parameter])


@dataclass(frozen=True)
class U8Parity:
    """An IR of 8-bit images against the float IR it was made from, in grey levels.

    One last bit of the input may flip codes inside a network of low bits, and with global attention all
    that follows. Hence the steps around the network are compared with the float tensors that it got and
    gave, and the network with itself on inputs whose last bits differ.
    """

    input_error: float
    """Largest error of the float image that the network gets, relative to 1."""
    differing: float
    """Share of the values that differ from the rounded float image that the network gives: only ties."""
    max_levels: int
    """Largest of these differences."""
    end_to_end_mean_levels: float
    """Mean difference from the rounded output of the float IR."""
    last_bit_mean_levels: float
    """The same of the float IR against itself, the last bit of half of its inputs flipped."""

    def complaint(self) -> str | None:
        """What is wrong; None if nothing is."""
        if not self.input_error <= 1e-6:
            return f"the u8 IR reads its image wrongly: error {self.input_error:.1e} of 1"
        if self.max_levels > 1 or not self.differing <= 1e-3:
            return (
                f"the u8 IR rounds {self.differing:.1e} of its output otherwise than to the nearest "
                f"grey level, by up to {self.max_levels}"
            )
        if not self.end_to_end_mean_levels <= max(0.05, 2 * self.last_bit_mean_levels):
            return (
                f"the u8 IR differs from the float IR by {self.end_to_end_mean_levels:.1e} grey levels, "
                f"a last bit of the input changes {self.last_bit_mean_levels:.1e}"
            )
        return None

    def raise_if_broken(self) -> None:
        """Raises RuntimeError with the complaint, if there is one."""
        if (complaint := self.complaint()) is not None:
            raise RuntimeError(complaint)


def check_u8_parity(
    u8_model: ov.Model, float_model: ov.Model, images: Sequence[NDArray[np.uint8]]
) -> U8Parity:
    """Compare what :func:`take_u8_nhwc` made with what it was given, on the CPU plugin.

    Args:
        images: shape ``(1, height, width, 3)``, sizes that both take.
    """
    tapped = u8_model.clone()
    nodes = {node.get_friendly_name(): node for node in tapped.get_ops()}
    tapped.add_outputs([nodes[_ENTERS].output(0), nodes[_LEAVES].input_value(0)])
    request = compile_ir(tapped).create_infer_request()
    network, u8_network = compile_ir(float_model), compile_ir(u8_model)
    free, last_bit, steps, errors = [], [], [], []
    random = np.random.default_rng(0)
    for image in images:
        # OpenVINO divides like this: other last bits would not compare like with like.
        planes = np.ascontiguousarray((image * np.float32(1 / 255)).transpose(0, 3, 1, 2))
        bit = np.nextafter(planes, random.integers(0, 2, planes.shape).astype(np.float32))
        expected = _grey_levels(network([planes])[0])
        free.append(np.abs(u8_network([image])[0] - expected).ravel())
        last_bit.append(np.abs(_grey_levels(network([bit])[0]) - expected).ravel())
        request.infer([image])
        levels, entered, left = (tensor.data for tensor in request.output_tensors)
        errors.append(float(np.abs(entered - planes).max()))
        steps.append(np.abs(levels - _grey_levels(left)).ravel())
    own = np.concatenate(steps)
    return U8Parity(
        input_error=max(errors),
        differing=float(np.mean(own > 0)),
        max_levels=int(own.max()),
        end_to_end_mean_levels=float(np.concatenate(free).mean()),
        last_bit_mean_levels=float(np.concatenate(last_bit).mean()),
    )


def _grey_levels(image: NDArray[np.float32]) -> NDArray[np.float32]:
    """Float NCHW to rounded NHWC."""
    rounded = np.rint(image.transpose(0, 2, 3, 1) * np.float32(255)).clip(0, 255)
    return rounded.astype(np.float32)
