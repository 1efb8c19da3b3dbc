import numpy as np
import openvino as ov
import pytest
import torch
from openvino.preprocess import PrePostProcessor
from torch import nn

from condiquant_openvino import (
    Upscaler,
    check_u8_parity,
    convert,
    read_ir,
    read_metadata,
    save,
    set_metadata,
    take_u8_nhwc,
)
from condiquant_openvino.running.upscaling import compile_ir
from condiquant_plugin import InputError


def photograph(height=16, width=24):
    return np.random.default_rng(0).integers(0, 256, (1, height, width, 3), np.uint8)


class Pointwise(nn.Module):
    """``gain * x + offset``, doubled in size: rounding and clamping can be foretold."""

    def __init__(self, gain=1.0, offset=0.0):
        super().__init__()
        self.gain, self.offset = gain, offset

    def forward(self, x):
        return (self.gain * x + self.offset).repeat_interleave(2, 2).repeat_interleave(2, 3)


def exported(module, size=(16, 24), static=False):
    return convert(module.eval(), torch.rand(1, 3, *size), static=static)


def output(model, image):
    return compile_ir(model)([image])[0]


@pytest.mark.parametrize("static", [False, True])
def test_it_is_the_rounded_float_ir(convolution_net, static):
    ir = exported(convolution_net(4), (16, 24), static)
    u8 = take_u8_nhwc(ir)
    assert str(u8.input().get_partial_shape()) == ("[1,16,24,3]" if static else "[1,?,?,3]")
    assert u8.output().get_partial_shape().is_static == static
    assert [port.any_name for port in (u8.input(), u8.output())] == ["image", "upscaled"]
    assert {port.get_element_type() for port in (u8.input(), u8.output())} == {ov.Type.u8}
    sizes = [(16, 24)] if static else [(16, 24), (9, 14)]
    parity = check_u8_parity(u8, ir, [photograph(*size) for size in sizes])
    parity.raise_if_broken()
    assert parity.max_levels <= 1
    assert parity.differing <= 1e-3
    assert parity.end_to_end_mean_levels <= 1e-3
    assert str(ir.input().get_partial_shape()).startswith("[1,3,")
    assert ir.input().get_element_type() == ov.Type.f32


def test_all_grey_levels_pass_unchanged_and_what_lies_outside_is_clamped():
    image = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, 3)
    image[..., 1] = image[..., 1].swapaxes(1, 2)
    enlarged = image.repeat(2, 1).repeat(2, 2)
    np.testing.assert_array_equal(output(take_u8_nhwc(exported(Pointwise())), image), enlarged)
    wild = output(take_u8_nhwc(exported(Pointwise(3.0, -1.0))), image)
    np.testing.assert_array_equal(wild, (enlarged.astype(int) * 3 - 255).clip(0, 255))


@pytest.mark.parametrize(("offset", "expected"), [(0.5, 0), (1.5, 2), (1.49, 1), (254.51, 255)])
def test_ties_go_to_the_even_level(offset, expected):
    found = output(take_u8_nhwc(exported(Pointwise(0.0, offset / 255))), photograph())
    assert (found == expected).all()


def test_saved_and_read_and_saved_again(convolution_net, tmp_path):
    ir = exported(convolution_net(3))
    set_metadata(ir, {"scale": 4})
    float_sizes, u8 = save(ir, tmp_path / "float.xml"), take_u8_nhwc(ir)
    sizes = save(u8, tmp_path / "first.xml")
    save(read_ir(tmp_path / "first.xml"), tmp_path / "second.xml")
    assert sizes["bin_bytes"] <= float_sizes["bin_bytes"] + 128  # packed weights stay packed
    assert (tmp_path / "first.bin").read_bytes() == (tmp_path / "second.bin").read_bytes()
    assert read_metadata(tmp_path / "second.xml") == {"scale": 4}
    again = read_ir(tmp_path / "second.xml")
    check_u8_parity(again, ir, [photograph()]).raise_if_broken()
    np.testing.assert_array_equal(output(again, photograph()), output(u8, photograph()))
    save(take_u8_nhwc(ir), tmp_path / "third.xml")
    assert (tmp_path / "third.xml").read_bytes() == (tmp_path / "first.xml").read_bytes()


def test_openvino_alone_unpacks_the_weights(convolution_net, tmp_path):
    """Why the steps are built apart: if this fails, PrePostProcessor can be used on the network."""
    ir = exported(convolution_net(3))
    packed = save(ir, tmp_path / "packed.xml")["bin_bytes"]
    steps = PrePostProcessor(ir)
    steps.input().tensor().set_element_type(ov.Type.u8).set_layout(ov.Layout("NHWC"))
    steps.input().model().set_layout(ov.Layout("NCHW"))
    assert save(steps.build(), tmp_path / "model.xml")["bin_bytes"] > 1.5 * packed


@pytest.mark.parametrize("fault", ["scale", "truncated"])
def test_wrong_steps_are_found_out(fault):
    ir = exported(Pointwise(0.7))
    u8 = take_u8_nhwc(ir)
    for node in u8.get_ordered_ops():
        name, kind = node.get_friendly_name(), node.get_type_name()
        if fault == "scale" and name.startswith("u8_nhwc/in/") and kind == "Multiply":
            node.input(1).replace_source_output(ov.opset13.constant(np.float32(1 / 256)).output(0))
        if fault == "truncated" and kind == "Round":
            for port in node.output(0).get_target_inputs():
                port.replace_source_output(node.input_value(0))
    with pytest.raises(RuntimeError, match="reads its image" if fault == "scale" else "nearest"):
        check_u8_parity(u8, ir, [photograph()]).raise_if_broken()


@pytest.mark.parametrize("static", [False, True])
def test_upscaler_runs_it_like_any_other(tmp_path, static):
    ir = exported(nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.PixelShuffle(2)), static=static)
    save(ir, tmp_path / "float.xml")
    save(take_u8_nhwc(ir), tmp_path / "u8.xml")
    image = torch.from_numpy(photograph(30, 41)[0] / np.float32(255)).permute(2, 0, 1)
    tile = None if static else 24
    found = Upscaler(tmp_path / "u8.xml", tile=tile)(image)
    expected = Upscaler(tmp_path / "float.xml", tile=tile)(image).clamp(0, 1)
    assert found.shape == expected.shape == (3, 60, 82)
    assert found.dtype == torch.float32
    assert 0 < (found - expected).abs().max() <= 0.51 / 255
    torch.testing.assert_close(found * 255, (found * 255).round(), atol=1e-3, rtol=0)


def test_upscaler_gives_it_the_nearest_grey_levels(tmp_path):
    save(take_u8_nhwc(exported(Pointwise())), tmp_path / "u8.xml")
    levels = np.arange(768).reshape(3, 16, 16) % 256
    for offset in (-0.49, -0.25, 0.0, 0.25, 0.49):
        image = ((levels + offset) / 255).astype(np.float32)
        found = Upscaler(tmp_path / "u8.xml")(image)
        np.testing.assert_array_equal(np.rint(found[:, ::2, ::2] * 255), levels)


def test_what_takes_no_image_is_refused(quantized):
    ir = convert(quantized(nn.Linear(8, 8), torch.rand(1, 4, 8), 4), torch.rand(1, 4, 8))
    with pytest.raises(InputError, match=r"f32\[1,4,8\]"):
        take_u8_nhwc(ir)
    with pytest.raises(InputError, match=r"u8\[1,\?,\?,3\]"):
        take_u8_nhwc(take_u8_nhwc(exported(Pointwise())))
