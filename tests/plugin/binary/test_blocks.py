import pytest
import torch
import torch.nn.functional as F

from condiquant_plugin import InputError
from condiquant_plugin.binary.blocks import BLOCKS, LCR, BBCUBlock, BiDRB, PlainBlock
from condiquant_plugin.binary.convolution import BinarizedConv2d, RPReLU

SHAPES = {
    "same": (2, 8, 6, 10),
    "down": (2, 16, 3, 5),
    "fusion_up": (2, 16, 6, 10),
    "fusion_down": (2, 4, 6, 10),
}


def randomized(module: torch.nn.Module) -> torch.nn.Module:
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module.eval()


def unit(lcr: LCR, index: int, x: torch.Tensor) -> torch.Tensor:
    """RPReLU(BiConv(x)) + x, written out."""
    convolution, activation = lcr.convolutions[index], lcr.activations[index]
    channel = (1, -1, 1, 1)
    signs = torch.where(x > convolution.binarizer.threshold.view(channel), 1.0, -1.0)
    w = convolution.weight
    scaled = w.sign() * w.abs().mean((1, 2, 3), keepdim=True)
    y = F.conv2d(signs, scaled, padding=1) - activation.shift.view(channel)
    y = torch.where(y > 0, y, y * activation.slope.view(channel)) + activation.offset.view(channel)
    return y + x


def test_convolution_is_the_scaled_one_with_zeros_outside():
    convolution = randomized(BinarizedConv2d(3, 5))
    x = torch.randn(2, 3, 7, 7)
    w = convolution.weight
    scaled = w.sign() * w.abs().mean((1, 2, 3), keepdim=True)
    padded = F.pad(convolution.binarizer(x), (1, 1, 1, 1))  # of signs: zeros stay zeros
    torch.testing.assert_close(convolution(x), F.conv2d(padded, scaled))


def test_sums_are_whole_numbers():
    convolution = randomized(BinarizedConv2d(16, 4, scaled=False))
    sums = convolution(torch.randn(1, 16, 9, 9))
    assert torch.equal(sums, sums.round())
    assert sums.abs().max() <= 16 * 9


def test_rprelu_shifts_bends_and_offsets():
    activation = RPReLU(1)
    for name, value in (("shift", 1.0), ("slope", 0.5), ("offset", 10.0)):
        torch.nn.init.constant_(getattr(activation, name), value)
    y = torch.tensor([-1.0, 1.0, 3.0]).view(1, 1, 1, 3)
    assert activation(y).flatten().tolist() == [9.0, 10.0, 12.0]


@pytest.mark.parametrize("form", SHAPES)
def test_forms_of_lcr(form):
    lcr = randomized(LCR(8, form))
    x = torch.randn(2, 8, 6, 10)
    found = lcr(x)
    assert found.shape == SHAPES[form]
    assert lcr.out_channels == SHAPES[form][1]
    if form == "fusion_down":
        expected = (unit(lcr, 0, x[:, :4]) + unit(lcr, 1, x[:, 4:])) / 2
    else:
        inputs = F.avg_pool2d(x, 2) if form == "down" else x
        expected = torch.cat([unit(lcr, i, inputs) for i in range(len(lcr.convolutions))], 1)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("form", SHAPES)
def test_information_in_float_passes_every_form(form):
    """A change that flips no sign reaches the output, as through no plain binarized convolution."""
    lcr, plain = randomized(LCR(8, form)), randomized(BinarizedConv2d(8, 8))
    x = 10 + torch.rand(1, 8, 4, 4)
    moved = x.clone()
    moved[0, 5, 2, 1] += 0.5
    assert not torch.equal(lcr(x), lcr(moved))
    assert torch.equal(plain(x), plain(moved))


def test_bidrb_is_lcrs_and_the_residual_beside_them():
    block = randomized(BiDRB(8, ["down", "same"]))
    x = torch.randn(2, 8, 6, 10)
    beside = F.conv2d(F.avg_pool2d(x, 2), block.residual.weight)
    torch.testing.assert_close(block(x), block.steps(x) + beside)
    assert block(x).shape == (2, block.out_channels, 3, 5)


def test_without_the_residual_bidrb_is_bbcus_block():
    block = randomized(BiDRB(8, gradient="polynomial", residual=False))
    bbcu = BBCUBlock(8)
    bbcu.units.load_state_dict(block.steps.state_dict())
    x = torch.randn(1, 8, 6, 6)
    assert torch.equal(block(x), bbcu(x))


def test_plain_block_lets_relu_decide_the_second_signs():
    block = randomized(PlainBlock(8))
    x = torch.randn(1, 8, 6, 6)
    inner = torch.where(block.first(x) > 0, 1.0, -1.0)
    w = block.second.weight
    scaled = w.sign() * w.abs().mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(block(x), x + F.conv2d(inner, scaled, padding=1))


@pytest.mark.parametrize("name", BLOCKS)
def test_every_parameter_of_every_block_learns(name):
    block = BLOCKS[name](8)
    block(torch.randn(2, 8, 6, 6)).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in block.parameters())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: LCR(7, "fusion_down"), ["fusion_down", "7", "even"]),
        (lambda: BiDRB(3, ["fusion_up", "fusion_down", "fusion_down"]), ["3", "even"]),
        (lambda: LCR(8, "upwards"), ["form='upwards'", "fusion_up"]),
        (lambda: BiDRB(8, []), ["forms=[]", "same"]),
        (lambda: BinarizedConv2d(8, 8, 4), ["kernel_size=4", "odd"]),
    ],
)
def test_bad_arguments_take_one_line(make, words):
    with pytest.raises(InputError) as caught:
        make()
    message = str(caught.value)
    assert all(word in message for word in words)
    assert "\n" not in message
