import pytest
import torch
import torch.nn.functional as F

from condiquant_basicsr import BiDRNSR, build_network, network_scale
from condiquant_plugin import InputError
from condiquant_plugin.binary.convolution import binarized_convolutions

SECTION = {"type": "BiDRNSR", "num_feat": 8, "num_block": 2, "upscale": 4}
BLOCKS = ("bidrb", "plain", "e2fif", "bbcu", "float")


@pytest.mark.parametrize("upscale", [2, 3, 4])
@pytest.mark.parametrize("block", BLOCKS)
def test_basicsr_builds_every_block_at_every_scale(block, upscale):
    network = build_network(SECTION | {"block": block, "upscale": upscale})
    assert network_scale(network) == upscale
    assert len(binarized_convolutions(network)) == (0 if block == "float" else 4)


@pytest.mark.parametrize("base", ["bicubic", "bilinear", "nearest"])
def test_the_output_is_the_interpolated_image_and_what_the_tail_adds(base):
    network = build_network(SECTION | {"base": base})
    torch.nn.init.zeros_(network.tail.weight)
    x = torch.rand(1, 3, 6, 7)
    corners = None if base == "nearest" else False
    expected = F.interpolate(x, scale_factor=4, mode=base, align_corners=corners)
    torch.testing.assert_close(network(x), expected)


def test_alignment_multiplies_the_image_and_divides_the_details():
    torch.manual_seed(0)
    aligned = build_network(SECTION | {"block": "bbcu"})
    assert aligned.alignment == pytest.approx(130 * 8 / 64)
    plain = build_network(SECTION | {"block": "bbcu", "alignment": 1})
    plain.load_state_dict(aligned.state_dict())
    x = torch.rand(1, 3, 6, 6)
    base = F.interpolate(x, scale_factor=4, mode="bicubic", align_corners=False)
    features = aligned.head(x * aligned.alignment)
    details = aligned.shuffle(aligned.tail(aligned.body(features))) / aligned.alignment
    torch.testing.assert_close(aligned(x), base + details)
    assert not torch.allclose(aligned(x), plain(x))


def test_forms_of_a_block_come_back_to_its_channels():
    network = build_network(SECTION | {"forms": ["fusion_up", "fusion_down"]})
    assert network(torch.rand(1, 3, 5, 5)).shape == (1, 3, 20, 20)
    assert len(binarized_convolutions(network)) == 8


def test_a_tail_of_eight_bits_searches_its_bounds_once_and_keeps_them():
    network = BiDRNSR(**{k: v for k, v in SECTION.items() if k != "type"}, tail_bits=8)
    x = torch.rand(2, 3, 8, 8)
    in_float = network.eval()(x)
    network.train()(x)
    searched = network.tail.input_quantizer.upper.clone()
    network.train()(10 * x)
    assert torch.equal(network.tail.input_quantizer.upper, searched)
    quantized = network.eval()(x)
    assert 0 < (quantized - in_float).abs().max() < 0.01
    loaded = BiDRNSR(**{k: v for k, v in SECTION.items() if k != "type"}, tail_bits=8)
    loaded.load_state_dict(network.state_dict())
    assert torch.equal(loaded.eval()(x), quantized)
    loaded.train()(10 * x)  # resumed: nothing is searched again
    assert torch.equal(loaded.tail.input_quantizer.upper, searched)


@pytest.mark.parametrize("block", BLOCKS)
def test_a_photograph_teaches_every_block_more_than_bicubic(block, photograph_pair):
    torch.manual_seed(0)
    network = build_network(SECTION | {"block": block, "num_feat": 16}).train()
    lr, hr = photograph_pair
    base = F.interpolate(lr, scale_factor=4, mode="bicubic", align_corners=False)
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    for _ in range(100):
        optimizer.zero_grad()
        F.l1_loss(network(lr), hr).backward()
        optimizer.step()
    assert F.l1_loss(network(lr), hr) < 0.99 * F.l1_loss(base, hr)


@pytest.fixture
def photograph_pair():
    import skimage.data

    from condiquant_basicsr import matlab_downscale
    from condiquant_basicsr.data.images import to_tensor

    photograph = skimage.data.astronaut()[:96, 180:276]
    return to_tensor(matlab_downscale(photograph, 4))[None], to_tensor(photograph)[None]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"block": "bidbr"}, ["block='bidbr'", "'bidrb'", "'plain'"]),
        ({"blok": "bidrb"}, ["no argument 'blok'", "did you mean block"]),
        ({"upscale": 5}, ["upscale=5", "2 or 3 or 4"]),
        ({"num_feat": 7, "forms": ["fusion_down", "fusion_up"]}, ["7", "even"]),
        ({"forms": ["fusion_up"]}, ["from 8 channels to 16", "[fusion_up, fusion_down]"]),
        ({"forms": ["down", "fusion_down"]}, ["halve the image", "'down'"]),
        ({"forms": ["samme"]}, ["form='samme'", "'same'"]),
        ({"block": "plain", "forms": ["same"]}, ["forms", "block='plain'"]),
        ({"block": "float", "gradient": "hardtanh"}, ["gradient"]),
        ({"gradient": "hardtan"}, ["gradient='hardtan'", "'hardtanh'"]),
        ({"tail_bits": 4}, ["tail_bits=4", "32 or 8"]),
        ({"num_in_ch": 1}, ["num_in_ch=1", "num_out_ch=3"]),
        ({"num_block": 0}, ["num_block=0"]),
        ({"base": "cubic"}, ["base='cubic'", "'bicubic'"]),
        ({"alignment": 0}, ["alignment=0"]),
    ],
)
def test_bad_sections_take_one_line(changes, words):
    with pytest.raises(InputError) as caught:
        build_network(SECTION | changes)
    message = str(caught.value)
    assert message.startswith("network_g: ")
    assert all(word in message for word in words), message
    assert "\n" not in message
