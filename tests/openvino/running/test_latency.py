"""Paired measurements: their structure, and the inputs they refuse; no test depends on a duration."""

import shutil
from statistics import median

import openvino as ov
import pytest
import torch
from torch import nn

from condiquant_openvino import (
    LayerExecution,
    compare_latency,
    convert,
    read_ir,
    save,
    set_metadata,
    take_u8_nhwc,
)
from condiquant_plugin import InputError
from networks import build

QUICK = {"iterations": 2, "duration": 0.01}


@pytest.fixture(scope="module")
def irs(tmp_path_factory):
    """Float CNN: dynamic, static, and of 8-bit images; a window network, dynamic."""
    folder, x = tmp_path_factory.mktemp("irs"), torch.rand(1, 3, 24, 24)
    cnn = convert(build("compact"), x)
    save(cnn, folder / "cnn.xml")
    save(take_u8_nhwc(cnn), folder / "u8.xml")
    save(convert(build("compact"), x, static=True), folder / "static.xml")
    windows = convert(build("swinir"), x)
    save(windows, folder / "foreign.xml")
    set_metadata(windows, {"pad_multiple": 8})
    save(windows, folder / "windows.xml")
    return {path.stem: path for path in folder.glob("*.xml")}


def refusal(paths, *arguments, **options):
    with pytest.raises(InputError) as caught:
        compare_latency(paths, *arguments, **{**QUICK, **options})
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_every_figure_of_every_ir(irs):
    paths = {"float": irs["cnn"], "bytes": irs["u8"]}
    found = compare_latency(paths, (1, 3, 16, 32), iterations=5, duration=0.05)
    assert list(found) == ["float", "bytes"]
    assert (found["float"]["shape"], found["bytes"]["shape"]) == ([1, 3, 16, 32], [1, 16, 32, 3])
    assert found["float"]["ratio"] == found["float"]["throughput_ratio"] == 1.0
    pairs = zip(*(figures["iteration_ms"] for figures in found.values()), strict=True)
    ratios = [theirs / reference for reference, theirs in pairs]
    assert len(ratios) == 5
    assert found["bytes"]["ratio"] == pytest.approx(median(ratios))
    for figures in found.values():
        assert 0 < figures["p10_ms"] <= figures["median_ms"] <= figures["p90_ms"]
        assert figures["ratio"] > 0
        assert figures["frames_per_second"] > 0
        assert figures["throughput_ratio"] > 0
        assert not figures["dynamic"]
        assert figures["precisions"] == {"f32": 5}
        assert figures["int8_share"] == 0
        assert [type(layer) for layer in figures["layers"]] == [LayerExecution] * 5


@pytest.mark.parametrize(
    ("hint", "latency", "throughput"),
    [("latency", True, False), ("throughput", False, True), ("none", True, True)],
)
def test_a_hint_chooses_what_is_measured(irs, hint, latency, throughput):
    found = compare_latency({"net": irs["cnn"]}, (1, 3, 16, 16), hint=hint, **QUICK)["net"]
    for key in ("median_ms", "p10_ms", "p90_ms", "ratio", "iteration_ms"):
        assert (found[key] is not None) == latency
    for key in ("frames_per_second", "throughput_ratio"):
        assert (found[key] is not None) == throughput
    assert len(found["layers"]) == 5


def test_the_slower_network_has_the_larger_ratio(tmp_path):
    """A hundred times the work: no noise turns that around."""
    for channels in (8, 256):
        layers = [nn.Conv2d(3, channels, 3, padding=1), nn.Conv2d(channels, 3, 3, padding=1)]
        middle = nn.Conv2d(channels, channels, 3, padding=1)
        network = nn.Sequential(layers[0], middle, layers[1])
        save(convert(network, torch.rand(1, 3, 16, 16)), tmp_path / f"{channels}.xml")
    paths = {"small": tmp_path / "8.xml", "large": tmp_path / "256.xml"}
    large = compare_latency(paths, (1, 3, 64, 64), **QUICK)["large"]
    assert large["ratio"] > 2
    assert large["throughput_ratio"] < 0.5


def test_a_dynamic_ir_stays_dynamic_unless_a_shape_is_given(irs):
    paths = {"windows": irs["windows"]}

    def found(*arguments, **options):
        figures = compare_latency(paths, *arguments, hint="latency", **QUICK, **options)["windows"]
        return figures["shape"], figures["dynamic"]

    assert found() == ([1, 3, 64, 64], True)
    assert found(data_shape=(1, 3, 16, 24)) == ([1, 3, 16, 24], True)
    assert found((1, 3, 16, 24)) == ([1, 3, 16, 24], False)


def test_a_static_ir_gives_the_shape_of_all(irs):
    found = compare_latency({n: irs[n] for n in ("cnn", "static", "u8")}, **QUICK)
    shapes = [[1, 3, 24, 24], [1, 3, 24, 24], [1, 24, 24, 3]]
    assert [figures["shape"] for figures in found.values()] == shapes
    assert [figures["dynamic"] for figures in found.values()] == [True, False, True]


def test_sizes_are_taken_where_they_are_static(irs, tmp_path):
    paths = {"cnn": irs["cnn"]}
    for index, shape in enumerate(([-1, 3, 24, 40], [-1, -1, 24, -1], [-1, -1, 40, 3])):
        parameter = ov.opset13.parameter(shape, ov.Type.f32)
        paths[str(index)] = tmp_path / f"{index}.xml"
        ov.save_model(ov.Model([ov.opset13.relu(parameter)], [parameter]), paths[str(index)])
    found = compare_latency(paths, hint="latency", **QUICK)
    shapes = [[1, 3, 24, 40]] * 3 + [[1, 24, 40, 3]]
    assert [figures["shape"] for figures in found.values()] == shapes


def test_default_size_fits_every_window(irs, tmp_path):
    ir = read_ir(irs["cnn"])
    set_metadata(ir, {"pad_multiple": 20})
    save(ir, tmp_path / "model.xml")
    paths = {"windows": irs["windows"], "twenty": tmp_path / "model.xml"}
    found = compare_latency(paths, hint="latency", **QUICK)
    assert [figures["shape"] for figures in found.values()] == [[1, 3, 80, 80]] * 2


def test_shapes_that_an_ir_cannot_take(irs):
    message = refusal({"net": irs["windows"]}, (1, 3, 20, 30))
    assert "20x30" in message
    assert "multiples of 8, such as 24x32" in message
    # What another tool exported says nothing about its windows: OpenVINO does, in both ways.
    for options in ({"shape": (1, 3, 20, 30)}, {"data_shape": (1, 3, 20, 30)}):
        assert "foreign.xml cannot take images of shape [1,3,20,30]" in refusal(
            {"net": irs["foreign"]}, **options
        )
    assert "static.xml takes images of shape [1,3,24,24], not [1,3,32,32]" in refusal(
        {"net": irs["static"]}, (1, 3, 32, 32)
    )
    assert "[1,4,24,24]" in refusal({"net": irs["cnn"]}, (1, 4, 24, 24))
    assert "[1,3,24] is no image" in refusal({"net": irs["cnn"]}, (1, 3, 24))
    assert "[1,3,0,24] is no image" in refusal({"net": irs["cnn"]}, (1, 3, 0, 24))
    both = refusal({"net": irs["cnn"]}, (1, 3, 24, 24), data_shape=(1, 3, 24, 24))
    assert "exclude each other" in both


def test_static_irs_of_two_shapes_are_not_compared(irs, tmp_path):
    save(convert(build("compact"), torch.rand(1, 3, 32, 32), static=True), tmp_path / "other.xml")
    message = refusal({"a": irs["static"], "b": tmp_path / "other.xml"})
    assert "takes [1,3,24,24]" in message
    assert "takes [1,3,32,32]" in message


def test_an_ir_that_takes_no_image(tmp_path):
    parameters = [ov.opset13.parameter([1, 8], ov.Type.f32) for _ in range(2)]
    save(ov.Model([ov.opset13.add(*parameters)], parameters), tmp_path / "sum.xml")
    assert "one image" in refusal({"sum": tmp_path / "sum.xml"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hint": "fast"}, "'fast' is not known: use one of latency, throughput, none"),
        ({"precision": "int8"}, "'int8' is not known"),
        ({"iterations": 0}, "0 iterations"),
        ({"duration": 0.0}, "0.0 s"),
        ({"duration": float("inf")}, "inf s"),
        ({"duration": float("nan")}, "nan s"),
        ({"device": "ABACUS"}, "device 'ABACUS' is not available: use one of"),
    ],
)
def test_settings_that_do_not_exist(irs, options, message):
    assert message in refusal({"net": irs["cnn"]}, (1, 3, 16, 16), **options)


@pytest.fixture
def ir(irs, tmp_path):
    for suffix in (".xml", ".bin"):
        shutil.copy(irs["cnn"].with_suffix(suffix), tmp_path / f"model{suffix}")
    return tmp_path / "model.xml"


def _flip_a_bit(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize(
    "spoil",
    [
        _flip_a_bit,
        lambda content: content[:-1],
        lambda content: content[: len(content) // 2],
        lambda content: content + b"\0",
        lambda content: b"",
    ],
)
def test_bin_that_is_not_the_one_saved(ir, spoil):
    weights = ir.with_suffix(".bin")
    weights.write_bytes(spoil(weights.read_bytes()))
    with pytest.raises(InputError, match=r"model\.bin") as caught:
        read_ir(ir)
    assert "\n" not in str(caught.value)


def test_bin_of_another_network(ir, irs):
    shutil.copy(irs["windows"].with_suffix(".bin"), ir.with_suffix(".bin"))
    with pytest.raises(InputError, match=r"model\.bin"):
        read_ir(ir)


def test_digest_follows_the_bin_through_another_save(ir, tmp_path):
    model = read_ir(ir)
    save(model, tmp_path / "half.xml", compress_to_fp16=True)
    assert read_ir(tmp_path / "half.xml").inputs
    assert (tmp_path / "half.bin").stat().st_size < ir.with_suffix(".bin").stat().st_size
    ov.save_model(model, tmp_path / "again.xml", compress_to_fp16=False)
    assert read_ir(tmp_path / "again.xml").inputs


def test_saving_leaves_the_model_as_it_was(irs, tmp_path):
    parameter = ov.opset13.parameter([1, 3, 8, 8], ov.Type.f32)
    model = ov.Model([ov.opset13.relu(parameter)], [parameter])
    save(model, tmp_path / "model.xml")
    assert not model.has_rt_info(["condiquant_bin_sha256"])


@pytest.mark.parametrize("content", [b"\0\1garbage", b"", b"<html></html>"])
def test_what_is_no_ir_is_not_given_to_other_frontends(ir, content, capfd):
    """They write to the error stream what they cannot parse."""
    ir.write_bytes(content)
    with pytest.raises(InputError, match="not a readable OpenVINO IR"):
        read_ir(ir)
    assert capfd.readouterr().err == ""
