import errno
import os
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256

import numpy as np
import openvino as ov
import openvino.opset13 as ops
import pytest
import torch
from openvino.preprocess import PrePostProcessor
from torch import nn

from condiquant_openvino import (
    check_parity,
    compare_latency,
    convert,
    halve,
    inspect,
    read_ir,
    read_metadata,
    save,
    set_metadata,
)
from condiquant_plugin import FakeQuantizer, InputError


@pytest.fixture
def ir(exported_convolutions):
    return exported_convolutions[1]


def test_metadata_survives_saving(ir, tmp_path):
    metadata = {"scale": 4, "weight_bits": 4, "name": "é", "sizes": [1, 2.5, None]}
    assert read_metadata(ir) == {"overflow": "safe", "isa": "vnni"}
    set_metadata(ir, metadata)
    assert read_metadata(ir) == metadata
    save(ir, tmp_path / "model.xml")
    assert read_metadata(tmp_path / "model.xml") == metadata


def test_saved_and_read_and_saved_again_is_the_simulation(exported_convolutions, tmp_path):
    model, ir, x = exported_convolutions
    save(ir, tmp_path / "first.xml")
    save(read_ir(tmp_path / "first.xml"), tmp_path / "second.xml")
    check_parity(model, tmp_path / "second.xml", [x]).raise_if_broken()


def f32_constants(ir):
    """Entries of the constants in f32: those of quantizers, and those of float operators."""
    sizes = {True: [], False: []}
    for node in ir.get_ops():
        if node.get_type_name() == "Constant" and node.get_output_element_type(0) == ov.Type.f32:
            users = [port.get_node() for port in node.output(0).get_target_inputs()]
            names = [user.get_friendly_name() for user in users]
            sizes[any(name.startswith("fake_quantize/") for name in names)].append(node.data.size)
    return sizes[True], sizes[False]


def test_small_float_constants_are_halved_and_those_of_quantizers_are_not(exported_convolutions):
    model, ir, x = exported_convolutions
    exact, rest = f32_constants(ir)
    assert max(rest) == 16 * 3 * 9  # the float convolution; all others are biases
    assert max(exact) == 48  # the rows of the linear layer, each with a scale
    halve(ir)
    assert f32_constants(ir)[0] == exact
    assert max(f32_constants(ir)[1]) < 16
    check_parity(model, ir, [x]).raise_if_broken()


def test_half_precision_takes_no_quantizer_of_a_float_kernel(quantized):
    """With a grid per channel: bounds and steps have as many entries as a bias."""
    x = torch.randn(1, 16, 32)
    model = quantized(nn.Linear(32, 32), x, 4)
    model.input = FakeQuantizer(4, "activation", row_blocks=32, axis=-1)
    model.input.search_bounds(x)
    ir = convert(model, x)
    before = f32_constants(ir)
    halve(ir)
    assert f32_constants(ir)[0] == before[0]
    assert len(f32_constants(ir)[1]) == len(before[1]) - 1
    check_parity(model, ir, [x]).raise_if_broken()


@pytest.mark.parametrize(
    ("values", "halved"), [(0.5, True), (1e-9, False), (1e6, False), (np.inf, False)]
)
def test_half_precision_takes_no_values_beyond_its_range(values, halved):
    parameter = ops.parameter([1, 64], np.float32)
    ir = ov.Model([ops.add(parameter, ops.constant(np.full(64, values, np.float32)))], [parameter])
    halve(ir)
    assert (f32_constants(ir) == ([], [])) == halved


@pytest.mark.parametrize(("entries", "halved"), [(15, False), (16, True)])
def test_half_precision_takes_no_few_values(entries, halved):
    parameter = ops.parameter([1, entries], np.float32)
    ir = ov.Model([ops.add(parameter, np.full(entries, 0.3, np.float32))], [parameter])
    halve(ir)
    assert (f32_constants(ir) == ([], [])) == halved


def test_shapes_are_computed_from_exact_floats(run):
    """A third in half precision is less than one: 12 pixels would become 3."""
    parameter = ops.parameter([1, 3, -1, -1], np.float32)
    sizes = ops.convert(ops.shape_of(parameter), np.float32)
    factors = ops.constant(np.array([1, 1, 1 / 3, 1 / 3] * 8, np.float32))
    scaled = ops.multiply(ops.concat([sizes] * 8, 0), factors)
    some = ops.gather(scaled, ops.constant(np.arange(4)), ops.constant(np.int64(0)))
    target = ops.convert(ops.floor(ops.add(some, ops.constant(np.float32(1e-6)))), np.int64)
    ir = ov.Model([ops.broadcast(ops.constant(np.float32(1)), target)], [parameter])
    halve(ir)
    assert run(ir, torch.rand(1, 3, 12, 12)).shape == (1, 3, 4, 4)


def test_half_precision_is_smaller_and_close(convolution_net, tmp_path, run):
    model, x = convolution_net(8), torch.rand(1, 3, 16, 16)
    model.head = torch.nn.Conv2d(3, 16, 9, padding=4)
    ir = convert(model, x)
    full = save(ir, tmp_path / "full.xml")
    half = save(ir, tmp_path / "half.xml", compress_to_fp16=True)
    assert half["bin_bytes"] < full["bin_bytes"] - 16 * 3 * 81 * 2 + 64
    layers = check_parity(model, tmp_path / "half.xml", [x]).layers
    assert max(layer.error for layer in layers) < 1e-6
    difference = run(read_ir(tmp_path / "half.xml"), x) - run(ir, x)
    assert 0 < difference.abs().mean() < 0.01 * run(ir, x).std()


def test_saving_leaves_no_other_files(ir, tmp_path):
    sizes = save(ir, tmp_path / "deep" / "model.xml")
    files = {file.name: file.stat().st_size for file in (tmp_path / "deep").iterdir()}
    assert files == {"model.xml": sizes["xml_bytes"], "model.bin": sizes["bin_bytes"]}


def contents(folder):
    return {file.name: sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


def test_an_ir_that_is_there_is_replaced(ir, convolution_net, tmp_path):
    xml = tmp_path / "model.xml"
    save(convert(convolution_net(2), torch.rand(1, 3, 16, 16)), xml)
    before = contents(tmp_path)
    save(ir, xml)
    after = contents(tmp_path)
    assert before.keys() == after.keys() == {"model.xml", "model.bin"}
    assert before["model.bin"] != after["model.bin"]
    assert len(read_ir(xml).get_ops()) == len(ir.get_ops())


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
@pytest.mark.parametrize("fails_at", [".bin", ".xml"])
def test_an_ir_that_is_there_outlives_a_save_that_fails(
    ir, convolution_net, tmp_path, monkeypatch, error, fails_at
):
    save(ir, tmp_path / "model.xml")
    before, replace = contents(tmp_path), os.replace

    def interrupted(source, target):
        if target.suffix == fails_at and source.stem != "backup":
            raise error
        replace(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    other = convert(convolution_net(2), torch.rand(1, 3, 16, 16))
    expected = InputError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected, match="No space left" if expected is InputError else ""):
        save(other, tmp_path / "model.xml")
    assert contents(tmp_path) == before
    with pytest.raises(expected):
        save(other, tmp_path / "new.xml")
    assert contents(tmp_path) == before


def test_two_threads_save_to_one_path(ir, convolution_net, tmp_path):
    models = [ir, convert(convolution_net(2), torch.rand(1, 3, 16, 16))]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(6):
            list(pool.map(lambda model: save(model, tmp_path / "model.xml"), models))
            read_ir(tmp_path / "model.xml")
    assert contents(tmp_path).keys() == {"model.xml", "model.bin"}


def test_an_ir_that_another_tool_changed(ir, tmp_path):
    set_metadata(ir, {"scale": 4})
    save(ir, tmp_path / "model.xml")
    steps = PrePostProcessor(read_ir(tmp_path / "model.xml"))
    steps.input().tensor().set_element_type(ov.Type.u8)
    steps.input().preprocess().convert_element_type(ov.Type.f32).scale(255.0)
    ov.save_model(steps.build(), tmp_path / "u8.xml")
    assert read_ir(tmp_path / "u8.xml").input().get_element_type() == ov.Type.u8
    assert read_metadata(tmp_path / "u8.xml") == {"scale": 4}


def test_folder_that_cannot_be_written(ir, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(InputError, match=r"cannot write .*model\.xml \(.+\): "):
        save(ir, tmp_path / "file" / "model.xml")
    if os.geteuid() != 0:
        closed = tmp_path / "closed"
        closed.mkdir(mode=0o500)
        with pytest.raises(InputError, match="cannot write"):
            save(ir, closed / "model.xml")
    with pytest.raises(InputError, match=r"must end in \.xml"):
        save(ir, tmp_path / "model.onnx")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda xml: xml.unlink(), "does not exist"),
        (lambda xml: xml.with_suffix(".bin").unlink(), r"model\.bin does not exist"),
        (lambda xml: xml.write_text("<html></html>"), "not a readable OpenVINO IR"),
        (lambda xml: xml.write_bytes(xml.read_bytes()[:5000]), "not a readable OpenVINO IR"),
        (lambda xml: xml.with_suffix(".bin").write_bytes(b""), "not a readable OpenVINO IR"),
    ],
)
def test_broken_files_are_input_errors(ir, tmp_path, spoil, message):
    xml = tmp_path / "model.xml"
    save(ir, xml)
    spoil(xml)
    with pytest.raises(InputError, match=message) as caught:
        read_ir(xml)
    assert "\n" not in str(caught.value)


def test_inspection(ir, tmp_path):
    set_metadata(ir, {"scale": 4})
    sizes = save(ir, tmp_path / "model.xml")
    found = inspect(tmp_path / "model.xml")
    assert found["metadata"] == {"scale": 4}
    assert {key: found[key] for key in sizes} == sizes
    assert found["inputs"] == {"image": "[1,3,?,?]"}
    assert list(found["outputs"]) == ["upscaled"]
    assert found["constants"]["u4"] == 7
    convolutions = 16 * 16 * 9 + 16 * 4 * 9 + 16 * 9 + 16 * 4 * 16 + 8 * 12 * 4
    assert found["constant_values"]["u4"] == convolutions + 2 * 16 * 48
    assert found["fake_quantize"] == {256: 6, 16: 6}


def test_paired_latency(convolution_net, tmp_path):
    x = torch.rand(1, 3, 16, 16)
    for bits in (2, 8):
        save(convert(convolution_net(bits), x), tmp_path / f"{bits}.xml")
    paths = {"two": tmp_path / "2.xml", "eight": tmp_path / "8.xml"}
    found = compare_latency(paths, (1, 3, 16, 16), iterations=5, duration=0.05)
    assert list(found) == ["two", "eight"]
    assert found["two"]["ratio"] == 1.0
    for entry in found.values():
        assert 0 < entry["p10_ms"] <= entry["median_ms"] <= entry["p90_ms"]
        assert sum(entry["precisions"].values()) == 8
    with pytest.raises(InputError, match="CPU"):
        compare_latency(paths, (1, 3, 16, 16), device="ABACUS")
