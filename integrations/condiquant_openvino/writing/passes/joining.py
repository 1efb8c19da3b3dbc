"""One FakeQuantize in the place of bytes that are decoded at once."""

from __future__ import annotations

import numpy as np
import openvino as ov
import openvino.opset13 as ops

from condiquant_openvino.markers import (
    Role,
    bytes_of,
    has_weight,
    is_encoder,
    mark,
    marker_of,
    origin,
    role_of,
)


def join(model: ov.Model) -> None:
    """Join in place, in front of convolutions and linear layers; it makes the .xml smaller.

    Signed bytes of 256 levels stay, but for those of a Concat: OpenVINO 2026.4 moves their FakeQuantize
    in front of it, and may take them for unsigned then. Operands of attention stay bytes: there the plugin
    takes signed integers only as such.
    """
    for encoder in model.get_ordered_ops():
        if not is_encoder(encoder):
            continue
        to_bytes = bytes_of(encoder)
        widened = to_bytes.input_value(0).get_node()
        decoders = [port.get_node() for port in to_bytes.output(0).get_target_inputs()]
        is_widened = role_of(widened) is Role.BYTES
        if not (is_widened or _joins_signed(encoder)) or len(decoders) != 1:
            continue
        if decoders[0].get_type_name() != "Convert":
            continue
        (port,) = decoders[0].output(0).get_target_inputs()
        scaled = port.get_node()
        if scaled.get_type_name() != "Multiply":
            continue
        consumers = [port.get_node() for port in scaled.output(0).get_target_inputs()]
        marker = marker_of(scaled)
        if marker is None or marker.role is not Role.EXIT or not all(map(has_weight, consumers)):
            continue
        lowest, highest = (widened.input_value(i) for i in (3, 4))
        fine = scaled.input_value(1).get_node().data
        real = [ops.constant(np.float32(b.get_node().data * fine)) for b in (lowest, highest)]
        integers = widened.input_value(0) if is_widened else widened.output(0)
        joined = ops.fake_quantize(integers, lowest, highest, *real, 256)
        mark(joined, marker)
        for port in scaled.output(0).get_target_inputs():
            port.replace_source_output(joined.output(0))


def _joins_signed(encoder: ov.Node) -> bool:
    """Whether an encoder makes signed bytes of tensors that are joined in front of it."""
    byte = bytes_of(encoder).get_output_element_type(0)
    return bool(byte == ov.Type.i8 and origin(encoder.input_value(0)).get_type_name() == "Concat")
