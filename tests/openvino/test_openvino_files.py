import os

import pytest
import torch

from condiquant_openvino import (
    check_parity,
    compare_latency,
    convert,
    inspect,
    read_ir,
    read_metadata,
    save,
    set_metadata,
)
from condiquant_plugin import InputError


@pytest.fixture
def ir(exported_convolutions):
    return exported_convolutions[1]


def test_metadata_survives_saving(ir, tmp_path):
    metadata = {"scale": 4, "weight_bits": 4, "name": "é", "sizes": [1, 2.5, None]}
    assert read_metadata(ir) == {}
    set_metadata(ir, metadata)
    assert read_metadata(ir) == metadata
    save(ir, tmp_path / "model.xml")
    assert read_metadata(tmp_path / "model.xml") == metadata


def test_saved_and_read_and_saved_again_is_the_simulation(exported_convolutions, tmp_path):
    model, ir, x = exported_convolutions
    save(ir, tmp_path / "first.xml")
    save(read_ir(tmp_path / "first.xml"), tmp_path / "second.xml")
    check_parity(model, tmp_path / "second.xml", [x]).raise_if_broken()


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


def test_folder_that_cannot_be_written(ir, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(InputError, match=r"cannot write .*model\.xml"):
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
    assert found["fake_quantize"] == {256: 7, 16: 7}


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
