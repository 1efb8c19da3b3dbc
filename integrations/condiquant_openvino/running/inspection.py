"""What is in an IR."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any

from condiquant_openvino.running.execution import layer_executions
from condiquant_openvino.running.reading import read_ir, read_metadata
from condiquant_openvino.running.upscaling import compile_ir


def inspect(path: str | os.PathLike[str], *, layers: bool = False) -> dict[str, Any]:
    """Describe an IR file, and what the CPU plugin makes of it with float operators in f32.

    Args:
        layers: also what each layer runs as.

    Returns:
        ``metadata``; ``xml_bytes`` and ``bin_bytes``; ``inputs`` and ``outputs`` (shapes by name,
        as text, ``?`` where dynamic); ``constants`` (element type to number of constants) and
        ``constant_values`` (element type to number of entries); ``fake_quantize`` (levels to
        number of nodes); ``executes`` (precision to number of convolutions and matrix products);
        with ``layers`` also ``layer_executions`` (:class:`LayerExecution` as dictionaries).

    Raises:
        InputError: if the file is no IR, or one that the CPU plugin cannot run.
    """
    model = read_ir(path)
    constants, values, levels = Counter[str](), Counter[str](), Counter[int]()
    for node in model.get_ops():
        if node.get_type_name() == "Constant":
            element_type = node.get_output_element_type(0).get_type_name()
            constants[element_type] += 1
            values[element_type] += prod(node.get_output_shape(0))
        elif node.get_type_name() == "FakeQuantize":
            levels[node.get_attributes()["levels"]] += 1
    executions, xml = layer_executions(model, compile_ir(model)), Path(path)
    described = {
        "metadata": read_metadata(model),
        "xml_bytes": xml.stat().st_size,
        "bin_bytes": xml.with_suffix(".bin").stat().st_size,
        "inputs": {port.any_name: str(port.partial_shape) for port in model.inputs},
        "outputs": {port.any_name: str(port.partial_shape) for port in model.outputs},
        "constants": dict(constants),
        "constant_values": dict(values),
        "fake_quantize": dict(levels),
        "executes": dict(Counter(layer.runs_as for layer in executions)),
    }
    if layers:
        described["layer_executions"] = [asdict(layer) for layer in executions]
    return described
