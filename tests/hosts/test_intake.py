"""Networks and crops as users have them: NNCF and Brevitas take or refuse the same."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, weight_norm

import condiquant_nncf
from condiquant_brevitas import quantize_sr
from condiquant_openvino import check_parity, convert
from condiquant_plugin import FakeQuantizer, InputError
from networks import build

CROPS = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def by_nncf(network, crops=CROPS):
    config = condiquant_nncf.QuantizationConfig(scope="all")
    return condiquant_nncf.quantize_network(network, crops, config).model


def by_brevitas(network, crops=CROPS):
    return quantize_sr(network, crops, scope="all")


HOSTS = pytest.mark.parametrize("quantize", [by_nncf, by_brevitas])


def weights_normed(norm):
    network = build("edsr")
    for block in network.body:
        for layer in (block.conv1, block.conv2):
            norm(layer)
    with torch.no_grad():
        network(CROPS)
    return network


@HOSTS
@pytest.mark.parametrize(
    "wrapped",
    [
        lambda: torch.compile(build("edsr"), backend="eager"),
        lambda: nn.DataParallel(build("edsr")),
        lambda: weights_normed(weight_norm),
        lambda: weights_normed(parametrizations.weight_norm),
    ],
)
def test_wrapped_networks_are_quantized_as_what_they_are(quantize, wrapped):
    found, expected = quantize(wrapped()), quantize(build("edsr"))
    weights = dict(expected.named_parameters())
    assert found.state_dict().keys() == expected.state_dict().keys()
    for name, weight in found.named_parameters():
        torch.testing.assert_close(weight, weights[name], rtol=1e-3, atol=1e-4)


@HOSTS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_end_as_float32(quantize, dtype):
    network = build("edsr").to(dtype)
    with pytest.warns(UserWarning, match=f"EDSR has parameters in {dtype}"):
        model = quantize(network, CROPS.to(dtype))
    expected = quantize(build("edsr").to(dtype).float(), CROPS.to(dtype).float())
    with torch.no_grad():
        assert model(CROPS).equal(expected(CROPS))


def test_an_ir_of_a_network_in_half_precision():
    crops = CROPS.half()
    with pytest.warns(UserWarning, match="float16"):
        model = by_nncf(build("edsr").half(), crops)
    ir = convert(model, crops[:1])
    assert ir.output().get_element_type().to_string() == "f32"
    check_parity(model, ir, [crops[:1]]).raise_if_broken()
    for export in (convert, lambda m, x: check_parity(m, ir, [x])):
        with pytest.raises(InputError, match=r"is torch.float16: call network.float\(\) before"):
            export(model.half(), crops[:1])
    model.float()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_items_of_a_dataset_in_another_precision(dtype):
    import nncf

    items = nncf.Dataset([crop[None].to(dtype) for crop in CROPS])
    model = condiquant_nncf.quantize(build("edsr"), items)
    expected = condiquant_nncf.quantize(
        build("edsr"), nncf.Dataset([crop[None].to(dtype).float() for crop in CROPS])
    )
    with torch.no_grad():
        assert model(CROPS).equal(expected(CROPS))


@HOSTS
def test_forms_of_crops(quantize):
    with torch.no_grad():
        expected = quantize(build("edsr"))(CROPS)
        for crops in (list(CROPS), CROPS.numpy(), CROPS.double()):
            assert quantize(build("edsr"), crops)(CROPS).equal(expected)
        assert quantize(build("edsr"), CROPS[0])(CROPS).equal(
            quantize(build("edsr"), CROPS[:1])(CROPS)
        )


class Returning(nn.Module):
    def __init__(self, pack):
        super().__init__()
        self.network, self.pack = build("edsr"), pack

    def forward(self, x):
        return self.pack(self.network(x), x)


class Adding(nn.Module):
    """Quantized by hand."""

    def __init__(self, pack):
        super().__init__()
        self.input, self.weight = FakeQuantizer(4, "activation"), FakeQuantizer(4, "weight")
        self.layer, self.pack = nn.Conv2d(3, 3, 1), pack

    def forward(self, x):
        weight = self.weight(self.layer.weight)
        return self.pack(nn.functional.conv2d(self.input(x), weight), x)


PACKS = pytest.mark.parametrize(
    "pack",
    [
        lambda y, x: (y, x),
        lambda y, x: [y],
        lambda y, x: {"sr": y, "lr": x},
        lambda y, x: None,
    ],
)


@HOSTS
@PACKS
def test_several_outputs_are_refused(quantize, pack):
    with pytest.raises(InputError, match=r"Returning returns a .* instead of one image: wrap it"):
        quantize(Returning(pack))


@PACKS
def test_several_outputs_are_refused_by_pipeline_and_exporter(pack):
    import nncf

    items = nncf.Dataset([CROPS[:1]])
    with pytest.raises(InputError, match=r"Returning returns a .* instead of one image"):
        condiquant_nncf.quantize(Returning(pack), items)
    with pytest.raises(InputError, match=r"Adding returns a .* instead of one image"):
        convert(Adding(pack), CROPS[:1])
    ir = convert(Adding(lambda y, x: y), CROPS[:1])
    with pytest.raises(InputError, match=r"Adding returns a .* instead of one image"):
        check_parity(Adding(pack), ir, [CROPS[:1]])


class Keywords(nn.Module):
    """``call`` computes the middle layer."""

    def __init__(self, call):
        super().__init__()
        self.head, self.layer, self.tail = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.linear, self.call = nn.Linear(16, 16), call

    def forward(self, x):
        return self.tail(self.call(self, self.head(x)))


F = nn.functional


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda m, x: F.conv2d(input=x, weight=m.layer.weight, bias=m.layer.bias), "conv2d"),
        (lambda m, x: F.conv2d(weight=m.layer.weight, input=x), "conv2d"),
        (lambda m, x: F.conv_transpose2d(input=x, weight=m.layer.weight), "conv_transpose2d"),
        (lambda m, x: F.linear(weight=m.linear.weight, input=x), "linear"),
        (lambda m, x: F.linear(x, bias=m.linear.bias, weight=m.linear.weight), "linear"),
        (lambda m, x: torch.matmul(other=x.transpose(-1, -2), input=x), "matmul"),
    ],
)
def test_keyword_calls_that_nncf_mistakes_are_refused(call, name):
    with pytest.raises(InputError, match=rf"Keywords calls {name} with \w+=, .* by position"):
        by_nncf(Keywords(call).eval())


@pytest.mark.parametrize(
    ("keyword", "positional"),
    [
        (
            lambda m, x: F.linear(input=x, weight=m.linear.weight, bias=m.linear.bias),
            lambda m, x: F.linear(x, m.linear.weight, m.linear.bias),
        ),
        (
            lambda m, x: F.conv2d(x, weight=m.layer.weight, bias=m.layer.bias, padding=1),
            lambda m, x: F.conv2d(x, m.layer.weight, m.layer.bias, padding=1),
        ),
        (
            lambda m, x: torch.matmul(input=x, other=x.transpose(-1, -2)),
            lambda m, x: torch.matmul(x, x.transpose(-1, -2)),
        ),
    ],
)
def test_keyword_calls_in_order(keyword, positional):
    outputs = []
    for call in (keyword, positional):
        torch.manual_seed(0)
        model = by_nncf(Keywords(call).eval())
        assert sum(isinstance(m, FakeQuantizer) for m in model.modules()) == 2
        with torch.no_grad():
            outputs.append(model(CROPS))
    assert outputs[0].equal(outputs[1])


class Rebuilding(nn.Module):
    def __init__(self):
        super().__init__()
        self.head, self.layer, self.source, self.tail = (
            nn.Conv2d(3, 3, 3, padding=1) for _ in range(4)
        )

    def forward(self, x):
        self.layer.weight.data = self.source.weight.data * 2
        return self.tail(self.layer(self.head(x)))


@HOSTS
def test_a_weight_that_forward_rebuilds_is_refused_by_name(quantize):
    with pytest.raises(InputError, match=r"layer.* gets its weight anew in every forward pass"):
        quantize(Rebuilding().eval())
