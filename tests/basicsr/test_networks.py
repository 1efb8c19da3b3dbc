import pytest
import torch
from basicsr.archs.srvgg_arch import SRVGGNetCompact
from basicsr.archs.swinir_arch import SwinIR
from basicsr.utils.registry import ARCH_REGISTRY
from spandrel.architectures.DAT import DAT

import condiquant_nncf
import condiquant_openvino
from condiquant_basicsr import build_network, load_network, network_scale, pad_multiple, upscale
from condiquant_plugin.errors import InputError

COMPACT = {"type": "SRVGGNetCompact", "num_feat": 8, "num_conv": 2, "upscale": 3}


def test_basicsr_architecture_comes_from_basicsr(swinir_section):
    network = build_network(swinir_section)
    assert type(network) is SwinIR
    assert not network.training


def test_spandrel_architectures_fill_gaps_and_displace_nothing(dat_section):
    before = dict(iter(ARCH_REGISTRY))
    assert type(build_network({**dat_section, "depth": [2]})) is DAT
    after = dict(iter(ARCH_REGISTRY))
    assert {name: after[name] for name in before} == before
    assert {"DAT", "HAT", "SPAN", "CRAFT", "OmniSR"} <= set(after)
    assert type(build_network(COMPACT)) is SRVGGNetCompact


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"type": "SwinlR"}, ["SwinlR", "did you mean", "SwinIR"]),
        ({"type": None}, ["type: SwinIR"]),
        ({"windowsize": 8}, ["'windowsize'", "window_size"]),
        ({"depths": [2, 2]}, ["SwinIR", "cannot be built"]),
        ({"embed_dim": "sixty"}, ["SwinIR", "cannot be built"]),
    ],
)
def test_wrong_section_is_one_line(swinir_section, change, parts):
    with pytest.raises(InputError) as error:
        build_network({**swinir_section, **change})
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("section", "scale"),
    [
        (COMPACT, 3),
        ({"type": "MSRResNet", "num_feat": 8, "num_block": 1, "upscale": 4}, 4),
        (
            {
                "type": "RRDBNet",
                "num_in_ch": 3,
                "num_out_ch": 3,
                "scale": 2,
                "num_feat": 8,
                "num_block": 1,
                "num_grow_ch": 4,
            },
            2,
        ),
        (
            {"type": "ECBSR", **dict.fromkeys(("num_in_ch", "num_out_ch"), 3)}
            | {
                "num_block": 1,
                "num_channel": 8,
                "with_idt": False,
                "act_type": "prelu",
                "scale": 2,
            },
            2,
        ),
    ],
)
def test_scale_is_found_by_running(section, scale):
    network = build_network(section)
    assert network_scale(network) == scale
    output = upscale(network, torch.rand(1, 3, 9, 13), scale, pad_multiple(network))
    assert output.shape == (1, 3, 9 * scale, 13 * scale)


def test_grayscale_network_is_refused():
    with pytest.raises(InputError, match="does not take an RGB image"):
        network_scale(build_network({**COMPACT, "num_in_ch": 1, "num_out_ch": 1}))


def test_pad_multiple_follows_windows(swinir, dat_section):
    assert pad_multiple(swinir) == 8
    assert pad_multiple(build_network({**dat_section, "depth": [2]})) == 32
    assert pad_multiple(build_network({**dat_section, "depth": [2], "split_size": [6, 8]})) == 24
    assert pad_multiple(build_network(COMPACT)) == 1
    assert pad_multiple(swinir, override=64) == 64


@pytest.mark.parametrize(("scale", "multiple"), [(1, 4), (2, 2), (4, 1)])
def test_pad_multiple_of_unshuffled_pixels_is_measured(scale, multiple):
    section = {"type": "RRDBNet", "num_in_ch": 3, "num_out_ch": 3, "scale": scale}
    network = build_network(section | {"num_feat": 8, "num_block": 1, "num_grow_ch": 4})
    assert pad_multiple(network) == multiple


def test_upscale_pads_by_mirroring_and_crops(swinir):
    image = torch.rand(1, 3, 16, 24)
    with torch.no_grad():
        torch.testing.assert_close(upscale(swinir, image, 2, 8), swinir(image))
        cut = image[..., :13, :21]
        mirrored = torch.cat([cut, cut[..., -3:, :].flip(-2)], -2)
        mirrored = torch.cat([mirrored, mirrored[..., -3:].flip(-1)], -1)
        expected = swinir(mirrored)[..., :26, :42]
    torch.testing.assert_close(upscale(swinir, cut, 2, 8), expected)


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (4, 30)])
def test_image_smaller_than_the_padding(swinir, size):
    output = upscale(swinir, torch.rand(1, 3, *size), 2, 8)
    assert output.shape == (1, 3, 2 * size[0], 2 * size[1])
    assert output.isfinite().all()


def test_span_becomes_single_convolutions_that_quantize(tmp_path):
    torch.manual_seed(0)
    section = {"type": "SPAN", "num_in_ch": 3, "num_out_ch": 3, "feature_channels": 16}
    network = build_network(section | {"upscale": 2})
    crops, path = torch.rand(2, 3, 24, 24), tmp_path / "span.pth"
    torch.save({"params": network.state_dict()}, path)
    with torch.no_grad():
        expected = network(crops)
    for given in (section | {"upscale": 2}, None):
        loaded, scale = load_network(given, str(path))
        with torch.no_grad():
            torch.testing.assert_close(loaded(crops), expected)
        assert scale == 2
    config = condiquant_nncf.QuantizationConfig(scope="all")
    quantized = condiquant_nncf.quantize_network(loaded, crops, config)
    name = "block_1.c2_r.0"
    (report,) = (r for r in quantized.reports if r.name == name)
    assert report.quantized_output_error_after < report.quantized_output_error_before
    with torch.no_grad():
        quantized.model(crops)
    trained = loaded.get_submodule(name).weight
    assert (quantized.model.get_submodule(name).weight - trained).abs().max() > 1e-4
    ir = condiquant_openvino.convert(quantized.model, crops[:1])
    condiquant_openvino.check_parity(quantized.model, ir, [crops[:1]]).raise_if_broken()
    with pytest.raises(InputError, match=r"eval_conv.* gets its weight anew"):
        condiquant_nncf.quantize_network(network, crops, config)


def test_multiples_that_spandrel_requires_of_its_architectures():
    network = build_network({"type": "UpCunet2x_fast"}).eval()
    multiple = pad_multiple(network)
    assert multiple == 4
    assert upscale(network, torch.rand(1, 3, 61, 50), 2, multiple).shape == (1, 3, 122, 100)
    with pytest.raises(RuntimeError):
        network(torch.rand(1, 3, 61, 50))
