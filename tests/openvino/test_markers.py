from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import openvino as ov
import openvino.opset13 as ops
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import condiquant_nncf
from condiquant_nncf import QuantizationConfig
from condiquant_openvino import check_parity, convert, layer_executions, pack, read_ir, save
from condiquant_openvino.markers import (
    Role,
    label_of,
    main_nodes,
    marker_of,
    node_name,
    role_of,
)
from condiquant_openvino.running.reading import layers_digest
from condiquant_openvino.writing.labels import labelled
from condiquant_plugin import FakeQuantizer
from condiquant_plugin.uniform.marking import MODEL_KEY, Marker

NAMES = [*(role.value.rpartition(".")[2] for role in Role), *Role, "transposed", "a#1", "x/exit"]


@given(
    st.sampled_from(list(Role)),
    st.text(),
    st.sampled_from([None, "weight", "operand"]),
    st.none() | st.integers(2, 8),
    st.none() | st.integers(1, 42),
    st.lists(st.integers(0, 128), max_size=5),
)
def test_markers_read_what_they_wrote(role, label, kind, bits, refinement, zero):
    marker = Marker(role, label, kind, bits, refinement, tuple(zero))
    assert Marker.from_text(marker.to_text()) == marker


def without_markers(ir, folder):
    """As earlier versions saved it: names only."""
    save(ir, folder / "model.xml")
    tree = ElementTree.parse(folder / "model.xml")
    for layer in tree.iter("layer"):
        for info in layer.findall("rt_info"):
            layer.remove(info)
    (info,) = tree.getroot().findall("rt_info")
    info.remove(info.find(MODEL_KEY[0]))
    layers = info.find("condiquant_layers_sha256")
    tree.write(folder / "model.xml")
    layers.set("value", layers_digest((folder / "model.xml").read_bytes()))
    tree.write(folder / "model.xml")
    return folder / "model.xml"


def test_markers_are_saved_and_cloned_with_kind_bits_zero_and_refinement(
    exported_convolutions, tmp_path
):
    model, ir, _ = exported_convolutions
    save(ir, tmp_path / "first.xml")
    ov.save_model(read_ir(tmp_path / "first.xml"), tmp_path / "second.xml")
    again = ov.Core().read_model(tmp_path / "second.xml").clone()
    found = [marker_of(node) for node in again.get_ordered_ops()]
    assert found == [marker_of(node) for node in ir.get_ordered_ops()]
    with labelled(model) as quantizers:
        for label, quantizer in quantizers.items():
            marker = marker_of(main_nodes(again.get_ops())[label])
            weight = quantizer.kind == "weight"
            x = model.get_submodule(label.partition(".")[0]).layer.weight if weight else None
            snapped = quantizer.snapped(x)
            given = (marker.kind, marker.bits, marker.refinement)
            assert given == (quantizer.kind, snapped.bits, snapped.refinement), label
            zeros = snapped.zero.reshape(-1).int().tolist()
            repeat = len(zeros) // len(marker.zero)
            assert [z for z in marker.zero for _ in range(repeat)] == zeros, label


def test_irs_of_earlier_versions_are_read_by_their_names(exported_convolutions, tmp_path):
    model, ir, x = exported_convolutions
    old = without_markers(ir, tmp_path)
    assert not any(marker_of(n) for n in ov.Core().read_model(old).get_ops())
    read = read_ir(old)
    roles = [(role_of(node), label_of(node)) for node in ir.get_ordered_ops()]
    assert [(role_of(node), label_of(node)) for node in read.get_ordered_ops()] == roles
    check_parity(model, old, [x]).raise_if_broken()
    new, was = (layer_executions(m, ov.Core().compile_model(m, "CPU")) for m in (ir, read))
    assert [replace(layer, operands="") for layer in new] == [
        replace(layer, operands="") for layer in was
    ]
    assert new[1].operands == "activation 4, weight 4"
    save(read, tmp_path / "again.xml")
    assert any(marker_of(n) for n in ov.Core().read_model(tmp_path / "again.xml").get_ops())


def test_names_decide_nothing(exported_convolutions):
    model, ir, x = exported_convolutions
    before = layer_executions(ir, ov.Core().compile_model(ir, "CPU"))
    for index, node in enumerate(ir.get_ops()):
        swapped = [Role.EXIT, Role.MAIN, Role.SCALED][index % 3]
        node.set_friendly_name(node_name(f"x{index}", swapped))
    check_parity(model, ir, [x]).raise_if_broken()
    after = layer_executions(ir, ov.Core().compile_model(ir, "CPU"))
    assert [layer.operands for layer in after] == [layer.operands for layer in before]
    assert [layer.runs_as for layer in after] == [layer.runs_as for layer in before]


def test_a_float_model_with_such_names_has_no_quantizers(tmp_path):
    x = ops.parameter([1, 4], np.float32)
    product = ops.multiply(x, ops.constant(np.float32(2)))
    product.set_friendly_name(node_name("x", Role.EXIT))
    save(ov.Model([product], [x]), tmp_path / "model.xml")
    assert not any(marker_of(node) for node in read_ir(tmp_path / "model.xml").get_ops())


class Attention(nn.Module):
    """Every form of a quantizer; ``name`` is in all labels."""

    def __init__(self, name):
        super().__init__()
        self.qkv = nn.Linear(16, 48)
        self.inputs = nn.ModuleList(
            FakeQuantizer(bits, "activation", name=f"{place}{name}")
            for place, bits in (("", 4), ("first ", 3), ("second ", 8))
        )
        self.operands = nn.ModuleList(
            FakeQuantizer(4, "operand", name=f"{place}.{name}") for place in "qk"
        )
        self.weights = nn.ModuleList(
            FakeQuantizer(4, "weight", name=f"{name}{place}") for place in ("", ".weight")
        )
        for quantizer in self.modules():
            if isinstance(quantizer, FakeQuantizer):
                quantizer.set_bounds(-2.0, 1.7)
        for quantizer in self.weights:
            quantizer.set_bounds(-0.2, 0.25)

    def forward(self, x):
        weight = self.weights[0](self.qkv.weight)
        q, k, v = nn.functional.linear(self.inputs[0](x), weight, self.qkv.bias).chunk(3, -1)
        scores = self.operands[0](q) @ self.operands[1](k).transpose(-1, -2)
        shared = self.inputs[1](v)
        out = nn.functional.linear(shared, self.weights[1](self.qkv.weight[:16]))
        return scores.softmax(-1) @ (shared + out)


@pytest.mark.parametrize("name", NAMES)
def test_parity_and_kernels_do_not_depend_on_names(name):
    torch.manual_seed(0)
    x, found = torch.randn(1, 8, 16), []
    for module_name in ("body", name):
        torch.manual_seed(0)
        model = Attention(module_name).eval()
        ir = convert(model, x)
        check_parity(model, ir, [x]).raise_if_broken()
        layers = layer_executions(ir, ov.Core().compile_model(ir, "CPU"))
        found.append([(layer.runs_as, layer.reason) for layer in layers])
    assert found[0] == found[1]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        for name in ("exit", "bytes"):
            self.add_module(name, nn.Conv2d(16, 16, 3, padding=1))

    def forward(self, x):
        return self.bytes(self.exit(x).relu())


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.head, self.tail = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 3, 3, padding=1)
        self.fake_quantize = Block()

    def forward(self, x):
        return self.tail(self.fake_quantize(self.head(x)))


def test_modules_named_like_parts_of_quantizers():
    torch.manual_seed(0)
    crops = torch.rand(2, 3, 12, 12)
    config = QuantizationConfig(4, 4, "all", recondition=None)
    model = condiquant_nncf.quantize_network(Network().eval(), crops, config).model
    ir = convert(model, crops[:1])
    check_parity(model, ir, [crops[:1]]).raise_if_broken()


def test_a_model_whose_own_nodes_are_named_like_quantizers():
    rng = np.random.default_rng(0)
    image = ops.parameter([1, 16], np.float32)
    low, high = (ops.constant(np.float32(v)) for v in (0.0, 1.5))
    values = ops.fake_quantize(image, low, high, low, high, 16)
    values.set_friendly_name(node_name("x", Role.EXIT))
    weight = ops.constant(rng.uniform(-1, 1, (16, 16)).astype(np.float32))
    low, high = (ops.constant(np.float32(v)) for v in (-1.0, 7 / 8))
    rounded = ops.fake_quantize(weight, low, high, low, high, 16)
    rounded.set_friendly_name(node_name("x"))
    product = ops.matmul(values, rounded, False, True)
    product.set_friendly_name(node_name("x", Role.SCALED))
    model = ov.Model([ops.relu(product)], [image])
    x = rng.uniform(0, 2, (1, 16)).astype(np.float32)
    results = [
        ov.Core().compile_model(m, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(x)[0]
        for m in (model, pack(model))
    ]
    assert np.abs(results[0] - results[1]).max() < 1e-5
    (layer,) = layer_executions(pack(model), ov.Core().compile_model(pack(model), "CPU"))
    assert layer.runs_as == "int8"


class Permuted(nn.Module):
    """The order of PixelShuffle, of blocks that are not square in a dynamic image."""

    def forward(self, x):
        y = x.reshape(1, 2, 2, 2, -1, 3).permute(0, 1, 4, 2, 5, 3)
        return y.reshape(1, 2, -1, 6)


class NamedLikeAnOperator(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = FakeQuantizer(4, "activation")
        self.weight = FakeQuantizer(4, "weight")
        self.layer = nn.Conv2d(4, 8, 1)
        self.pixel_shuffle = Permuted()

    def forward(self, x):
        return self.pixel_shuffle(
            self.layer._conv_forward(self.inner(x), self.weight(self.layer.weight), self.layer.bias)
        )


def test_a_module_called_pixel_shuffle_that_is_none():
    torch.manual_seed(0)
    x = torch.rand(1, 4, 6, 4)
    model = NamedLikeAnOperator().eval()
    model.weight.set_bounds(-0.5, 0.5)
    check_parity(model, convert(model, x), [x]).raise_if_broken()


class Twice(nn.Module):
    """Quantizers whose labels could be those of each other's second use."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.weight = FakeQuantizer(4, "weight", name="weight")
        for name, top in (("a", 1.0), ("a#1", 3.0), ("a#1_", 2.0)):
            self.add_module(name, FakeQuantizer(4, "activation", name=name))
            self.get_submodule(name).set_bounds(0.0, top)
        self.weight.set_bounds(-0.4, 0.4)

    def forward(self, x):
        weight = self.weight(self.layer.weight)
        for name in ("a", "a#1", "a", "a#1_"):
            x = nn.functional.linear(self.get_submodule(name)(x.relu()), weight)
        return x


def test_labels_of_second_uses_are_not_those_of_others():
    torch.manual_seed(0)
    x, model = torch.randn(1, 5, 8), Twice().eval()
    check_parity(model, convert(model, x), [x]).raise_if_broken()
