import copy
import logging
from collections import Counter

import pytest
import torch
from torch import nn

import condiquant_nncf
import networks
from condiquant_openvino import (
    check_parity,
    convert,
    convert_beside_float,
    inspect,
    layer_executions,
    save,
)
from condiquant_openvino.markers import arriving, is_encoder
from condiquant_openvino.running.upscaling import compile_ir
from condiquant_plugin import FakeQuantizer, InputError, fake_quantizers
from condiquant_plugin.layerwise import precision
from condiquant_plugin.uniform.bits import FLOAT_BITS
from networks import build

BYTES_PER_WEIGHT = {2: 1 / 4, 3: 3 / 8, 4: 1 / 2, 6: 3 / 4, 5: 1, 8: 1}


def constants(model):
    """Element type to entries."""
    found = {}
    for node in model.get_ops():
        if node.get_type_name() == "Constant":
            name = node.get_output_element_type(0).get_type_name()
            found[name] = found.get(name, 0) + node.data.size
    return found


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_ir_equals_simulation(convolution_net, bits):
    model = convolution_net(bits)
    ir = convert(model, torch.rand(1, 3, 16, 16))
    parity = check_parity(model, ir, [torch.rand(1, 3, 16, 16), torch.rand(1, 3, 24, 20)])
    parity.raise_if_broken()
    assert len(parity.layers) == 7
    assert max(layer.error for layer in parity.layers) < 1e-6
    assert parity.stretch_max_abs < 1e-5
    assert {layer.operator for layer in parity.layers} == {
        "Convolution",
        "GroupConvolution",
        "MatMul",
        "GroupConvolutionBackpropData",
        "ConvolutionBackpropData",
    }


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_products_run_in_int8(convolution_net, bits):
    ir = convert(convolution_net(bits), torch.rand(1, 3, 16, 16))
    runs_as = [layer.runs_as for layer in layer_executions(ir, compile_ir(ir))]
    assert runs_as.count("int8") >= 5
    assert len(runs_as) == 8


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("row_blocks", [1, 3, 96])
def test_weights_are_stored_packed(quantized, tmp_path, bits, row_blocks):
    layer, x = nn.Linear(128, 96, bias=False), torch.rand(1, 10, 128)
    ir = convert(quantized(layer, x, bits, row_blocks=row_blocks), x)
    sizes = save(ir, tmp_path / "model.xml")
    packed = 96 * 128 * BYTES_PER_WEIGHT[bits]
    per_row = 8 * 96 + 16 * row_blocks if row_blocks > 1 else 0
    assert packed < sizes["bin_bytes"] < packed + per_row + 512


@pytest.mark.parametrize(("name", "bits"), [("swinir", 2), ("dat", 4), ("edsr", 3), ("compact", 4)])
def test_networks_quantized_by_nncf(name, bits, monkeypatch):
    # Narrower, DAT's position-bias network has width 0, and OpenVINO crashes on empty MVN.
    monkeypatch.setitem(networks.SECTIONS["dat"], "embed_dim", 32)
    size = 32 if name == "dat" else 16
    images = torch.rand(2, 3, size, size)
    config = condiquant_nncf.QuantizationConfig(
        weight_bits=bits,
        activation_bits=bits,
        scope="transformer" if name in ("swinir", "dat") else "all",
        recondition=None,
    )
    model = condiquant_nncf.quantize_network(build(name), images, config).model
    ir = convert(model, images)
    parity = check_parity(model, ir, [images[:1]])
    parity.raise_if_broken()
    assert parity.stretch_mean_abs < 1e-5
    weights = [q for q in fake_quantizers(model).values() if q.kind == "weight"]
    products = sum(q.kind == "operand" for q in fake_quantizers(model).values())
    assert len(parity.layers) == len(weights) + products // 2
    assert f"u{bits}" in constants(ir)


@pytest.mark.parametrize(("name", "bits"), [("swinir", 4), ("dat", 3), ("edsr", 8)])
def test_float_inputs_beside_packed_weights(name, bits, monkeypatch):
    monkeypatch.setitem(networks.SECTIONS["dat"], "embed_dim", 32)
    size, every = (32 if name == "dat" else 16), name == "edsr"
    images = torch.rand(2, 3, size, size)
    rule = {"weight_bits": bits, "activation_bits": "float"}
    config = condiquant_nncf.QuantizationConfig(
        scope="all" if every else "transformer",
        recondition=None,
        layers={"*.conv1" if every else "*.fc?": rule},
    )
    model = condiquant_nncf.quantize_network(build(name), images, config).model
    ir = convert(model, images)
    parity = check_parity(model, ir, [images[:1]])
    parity.raise_if_broken()
    assert {8: "u8"}.get(bits, f"u{bits}") in constants(ir)
    in_float = [n for n, own in precision.layer_bits(model).items() if own == (bits, FLOAT_BITS)]
    runs = {layer.name: layer for layer in layer_executions(ir, compile_ir(ir))}
    assert in_float
    for layer in in_float:
        assert runs[layer].runs_as == "f32"
        assert runs[layer].reason == "weight in float form: its input is not quantized"
    assert any(layer.runs_as == "int8" for layer in runs.values())


def test_any_size_where_the_trace_allows():
    config = condiquant_nncf.QuantizationConfig(scope="transformer", recondition=None)
    images = torch.rand(2, 3, 24, 32)
    model = condiquant_nncf.quantize_network(build("swinir"), images, config).model
    ir = convert(model, images)
    assert ir.input().get_partial_shape().to_string() == "[1,3,?,?]"
    check_parity(model, ir, [torch.rand(1, 3, 40, 24)], max_layers=4).raise_if_broken()


def test_static_shape(convolution_net, run):
    model, x = convolution_net(4), torch.rand(1, 3, 16, 24)
    ir = convert(model, x.expand(2, -1, -1, -1), static=True)
    assert list(ir.input().get_shape()) == [1, 3, 16, 24]
    assert list(ir.output().get_shape()) == list(model(x).shape)
    check_parity(model, ir, [x]).raise_if_broken()


@pytest.mark.parametrize("fp16", [False, True])
def test_converted_twice_is_the_same_file(convolution_net, tmp_path, fp16):
    model, x = convolution_net(3), torch.rand(1, 3, 16, 16)
    for name in ("a", "b"):
        save(convert(model, x), tmp_path / f"{name}.xml", compress_to_fp16=fp16)
    assert (tmp_path / "a.xml").read_bytes() == (tmp_path / "b.xml").read_bytes()
    assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "b.bin").read_bytes()


def test_model_is_left_alone(exported_convolutions):
    model, _, x = exported_convolutions
    before = copy.deepcopy(model.state_dict())
    names = [q.name for q in fake_quantizers(model).values()]
    model.train()
    ir = convert(model, x)
    check_parity(model, ir, [x], max_layers=1)
    assert model.training
    assert [q.name for q in fake_quantizers(model).values()] == names
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_ir_does_not_follow_later_changes_of_the_model(exported_convolutions, run):
    model, _, x = exported_convolutions
    ir = convert(model, x)
    with torch.no_grad():
        expected = model(x)
        for parameter in model.parameters():
            parameter.zero_()
    torch.testing.assert_close(run(ir, x), expected, rtol=0, atol=1e-5)


def test_disabled_quantizers_are_not_exported(convolution_net):
    model, x = convolution_net(4), torch.rand(1, 3, 16, 16)
    for quantizer in fake_quantizers(model).values():
        quantizer.enabled = False
    ir = convert(model, x)
    assert "u4" not in constants(ir)
    parity = check_parity(model, ir, [x])
    assert parity.layers == []
    assert parity.max_abs < 1e-5


def test_one_quantizer_used_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.input = FakeQuantizer(4, "activation", name="shared")
            self.weight = FakeQuantizer(4, "weight")
            self.layer = nn.Linear(16, 16)

        def forward(self, x):
            for _ in range(2):
                weight = self.weight(self.layer.weight)
                x = nn.functional.linear(self.input(x), weight, self.layer.bias)
            return x

    model, x = Twice().eval(), torch.randn(1, 8, 16)
    model.input.set_bounds(-2.0, 1.7)
    model.weight.set_bounds(-0.2, 0.25)
    parity = check_parity(model, convert(model, x), [x])
    parity.raise_if_broken()
    assert [layer.name for layer in parity.layers] == [
        "shared x weight",
        "shared#1 x weight#1",
    ]


def test_masks_and_biases_are_stored_as_tables(tmp_path):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            positions = torch.arange(64)
            self.register_buffer("index", positions[:, None] - positions[None] + 63)
            self.table = nn.Parameter(torch.randn(127, 4))

        def forward(self, x):
            bias = self.table[self.index.flatten()].view(64, 64, 4).permute(2, 0, 1)
            return (x @ x.transpose(-2, -1) + bias).softmax(-1) @ x

    model, x = Attention().eval(), torch.randn(1, 4, 64, 8)
    ir = convert(model, x)
    sizes = save(ir, tmp_path / "model.xml")
    assert sizes["bin_bytes"] < 64 * 64 + 127 * 4 * 4 + 512
    assert check_parity(model, tmp_path / "model.xml", [x]).max_abs < 1e-6
    assert inspect(tmp_path / "model.xml")["constants"]["u8"] == 1


def test_what_cannot_be_traced_is_an_input_error():
    class Untraceable(nn.Module):
        def forward(self, x):
            raise RuntimeError("no such path")

    with pytest.raises(InputError, match="Untraceable"):
        convert(Untraceable(), torch.rand(1, 3, 8, 8))


def one_block(monkeypatch, **changes):
    """SwinIR with one block of attention in it, quantized, and an image."""
    monkeypatch.setitem(networks.SECTIONS["swinir"], "depths", [1])
    monkeypatch.setitem(networks.SECTIONS["swinir"], "num_heads", [2])
    images = torch.rand(2, 3, 16, 16)
    config = condiquant_nncf.QuantizationConfig(recondition=None, rounding="nearest", **changes)
    return condiquant_nncf.quantize_network(build("swinir"), images, config).model, images[:1]


def test_transforms_are_float_products_named_after_their_layers(monkeypatch):
    model, image = one_block(monkeypatch, transform="alignment")
    ir = convert(model, image)
    compiled = compile_ir(ir)
    runs_as = {layer.name: layer.runs_as for layer in layer_executions(ir, compiled)}
    layers = [n.removesuffix(".transform") for n in runs_as if n.endswith(".transform")]
    assert [name.rpartition(".")[2] for name in layers] == ["qkv", "proj", "fc1", "fc2"]
    assert {runs_as[f"{name}.transform"] for name in layers} == {"f32"}
    # The plugin does not tell what the smallest of them runs as.
    assert {"int8"} <= {runs_as[name] for name in layers} <= {"int8", "unknown"}
    executed = compiled.get_runtime_model().get_ops()
    kernels = {node.get_rt_info()["layerType"].astype(str) for node in executed}
    # Kernels of compressed weights round their inputs.
    assert not any("Compressed" in kernel for kernel in kernels)


def test_a_transform_does_not_take_in_the_rounding_behind_it(monkeypatch):
    model, image = one_block(monkeypatch, transform="alignment")
    ir = convert(model, image, static=True, isa="vnni")
    rounding = [node for node in ir.get_ops() if is_encoder(node)]
    apart = [node for node in rounding if arriving(node) != node.input_value(0)]
    transforms = [n for n in ir.get_ops() if n.get_friendly_name().endswith(".transform")]
    assert len(apart) == len(transforms) == 4


def test_what_openvino_does_not_know_is_named_and_logs_go_on():
    class Decomposition(nn.Module):
        def forward(self, x):
            return torch.linalg.qr(x)[0]

    root = logging.getLogger()
    before = root.level, root.filters[:]
    with pytest.raises(InputError, match=r"cannot convert Decomposition: .*linalg_qr"):
        convert(Decomposition(), torch.rand(1, 3, 8, 8))
    assert (root.level, root.filters) == before


@torch.no_grad()
def test_from_one_trace_come_the_same_ir_and_the_network_without_quantizers(convolution_net):
    model, x, other = convolution_net(4), torch.rand(1, 3, 16, 16), torch.rand(1, 3, 24, 20)
    ir, in_float = convert_beside_float(model, x)
    alone = convert(model, x)
    assert [n.get_type_name() for n in ir.get_ordered_ops()] == [
        n.get_type_name() for n in alone.get_ordered_ops()
    ]
    torch.testing.assert_close(compile_ir(ir)(other)[0], compile_ir(alone)(other)[0])
    for quantizer in fake_quantizers(model).values():
        quantizer.enabled = False
    expected = model(other)
    found = torch.from_numpy(compile_ir(in_float)(other)[0])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("isa", ["vnni", "avx2"])
def test_softmax_maps_by_row_are_exponentials_whose_products_are_divided(isa, monkeypatch):
    model, image = one_block(monkeypatch, softmax_scale="row")
    ir, in_float = convert_beside_float(model, image, static=True, isa=isa)
    found, plain = (Counter(n.get_type_name() for n in each.get_ops()) for each in (ir, in_float))
    assert (found["Exp"], found["Softmax"], found["ReduceMax"], found["ReduceSum"]) == (1, 0, 1, 1)
    assert (plain["Exp"], plain["Softmax"], plain["ReduceMax"], plain["ReduceSum"]) == (0, 1, 0, 0)
    (exponential,) = (node for node in ir.get_ops() if node.get_type_name() == "Exp")
    products = [node for node in ir.get_ops() if node.get_type_name() == "MatMul"]
    divided = [p for p in products if "Divide" in {n.get_type_name() for n in consumers(p)}]
    assert len(divided) == 1
    assert exponential.get_output_shape(0)[-1] == divided[0].get_input_shape(0)[-1]
    if isa == "vnni":
        runs_as = {layer.name: layer.runs_as for layer in layer_executions(ir, compile_ir(ir))}
        assert runs_as["layers.0.residual_group.blocks.0.attn/matmul/1"] == "int8"


@torch.no_grad()
def test_a_networks_own_quotient_of_what_is_quantized_stays():
    class Normalized(nn.Module):
        def __init__(self):
            super().__init__()
            self.quantizer = FakeQuantizer(4, "operand")

        def forward(self, x):
            shares = self.quantizer(x.relu())
            return (shares / shares.sum(-2, keepdim=True)) @ x

    model, x = Normalized().eval(), torch.rand(1, 3, 16, 16) + 0.1
    model.quantizer.search_bounds(x)
    ir, in_float = convert_beside_float(model, x, static=True)
    torch.testing.assert_close(torch.from_numpy(compile_ir(ir)(x)[0]), model(x))
    model.quantizer.enabled = False
    torch.testing.assert_close(torch.from_numpy(compile_ir(in_float)(x)[0]), model(x))


def consumers(node):
    return [port.get_node() for port in node.output(0).get_target_inputs()]


def test_the_float_network_beside_an_ir_has_no_transforms(monkeypatch):
    model, x = one_block(monkeypatch, transform="alignment")
    transformed, plain = (
        [n for n in each.get_ordered_ops() if n.get_friendly_name().endswith(".transform")]
        for each in convert_beside_float(model, x, static=True)
    )
    assert transformed
    assert not plain
