import numpy as np
import openvino as ov
import pytest
import torch
from torch import nn

from condiquant_openvino import check_parity, convert, halve, layer_executions, save
from condiquant_openvino.running.instruction_sets import lower_instruction_sets, run_with
from condiquant_openvino.running.reading import read_ir
from condiquant_openvino.running.upscaling import compile_ir
from condiquant_plugin import InputError
from condiquant_plugin.binary.blocks import BLOCKS
from condiquant_plugin.binary.convolution import BinarizedConv2d

KERNELS = ("int8", "u1")
RUNS_AS = {"int8": "int8", "u1": "u1"}


class Network(nn.Module):
    """A float convolution, binarized blocks, a float convolution: small, of the real parts."""

    def __init__(self, block, channels=16):
        super().__init__()
        self.head = nn.Conv2d(3, channels, 3, padding=1)
        self.body = nn.Sequential(*(BLOCKS[block](channels) for _ in range(2)))
        self.tail = nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, x):
        return self.tail(self.body(self.head(x)))


def trained(network):
    """With thresholds and statistics that are not those of the start."""
    for name, parameter in network.named_parameters():
        if "threshold" in name or "shift" in name:
            nn.init.normal_(parameter, std=0.1)
    network.train()(torch.rand(4, 3, 16, 16))
    return network.eval()


def compiled(network, x, kernel):
    return compile_ir(convert(network, x, static=True, binary_kernel=kernel))


@pytest.mark.parametrize("kernel", KERNELS)
def test_sums_and_signs_are_exact_up_to_the_border(kernel):
    convolution = BinarizedConv2d(16, 8, scaled=False)
    nn.init.normal_(convolution.binarizer.threshold)
    with torch.no_grad():
        convolution.binarizer.threshold[0] = 0
    x = torch.randn(1, 16, 9, 11)
    for column, value in enumerate((0.0, -0.0, 1e-12, -1e-12)):
        x[0, 0, :, column] = value
    at = convolution.binarizer.threshold.detach()
    x[0, :, 4, 5] = at  # -1, as in torch
    x[0, 1:, 4, 6] = torch.nextafter(at, torch.tensor(9.0))[1:]  # +1
    x[0, 1:, 4, 7] = torch.nextafter(at, torch.tensor(-9.0))[1:]  # -1
    found = compiled(convolution, x, kernel)([x.numpy()])[0]
    expected = convolution.eval()(x).detach().numpy()
    assert (found == expected).all()
    assert (found == found.round()).all()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("block", ["bidrb", "plain", "e2fif", "bbcu"])
def test_blocks_compute_what_torch_does_in_the_kernel_that_is_meant(block, kernel):
    network, x = trained(Network(block)), torch.rand(1, 3, 12, 20)
    ir = convert(network, x, static=True, binary_kernel=kernel)
    parity = check_parity(network, ir, [x])
    parity.raise_if_broken()
    assert [layer.error for layer in parity.layers] == [0.0] * 4
    assert parity.max_abs < 1e-5
    executions = layer_executions(ir, compile_ir(ir))
    binarized = [layer.runs_as for layer in executions if layer.runs_as != "f32"]
    assert binarized == [RUNS_AS[kernel]] * 4


def test_an_ir_of_any_size_runs_in_int8():
    network = trained(Network("bidrb"))
    ir = convert(network, torch.rand(1, 3, 12, 12))
    assert ir.is_dynamic()
    images = [torch.rand(1, 3, 12, 12), torch.rand(1, 3, 9, 17)]
    check_parity(network, ir, images).raise_if_broken()


def test_default_properties_are_right_with_int8_kernels():
    network, x = trained(Network("bidrb")), torch.rand(1, 3, 12, 20)
    check_parity(network, convert(network, x), [x], properties={}).raise_if_broken()


@pytest.mark.parametrize("instruction_set", lower_instruction_sets())
@pytest.mark.parametrize("kernel", KERNELS)
def test_lower_instruction_sets_give_the_same(tmp_path, kernel, instruction_set):
    network, x = trained(Network("bidrb")), torch.rand(1, 3, 12, 20)
    path = tmp_path / "model.xml"
    save(convert(network, x, static=True, binary_kernel=kernel), path)
    found = run_with(instruction_set, output_of, path, x.numpy())
    np.testing.assert_allclose(found, network(x).detach().numpy(), atol=1e-5)


def output_of(path, x):
    return compile_ir(read_ir(path))([x])[0]


@pytest.mark.parametrize("kernel", KERNELS)
def test_weights_take_one_bit_each(tmp_path, kernel):
    convolution, x = BinarizedConv2d(64, 64, scaled=False), torch.rand(1, 64, 8, 8)
    save(convert(convolution, x, static=True, binary_kernel=kernel), tmp_path / "model.xml")
    weights = 64 * 64 * 9
    stored = (tmp_path / "model.bin").stat().st_size
    assert weights / 8 < stored < weights / 8 + 64 * 4 * 5


def test_a_scale_stays_behind_the_convolution():
    """In the weights it would leave float kernels; OpenVINO's conversion puts it there."""
    convolution, x = BinarizedConv2d(16, 8), torch.randn(1, 16, 8, 8)
    ir = convert(convolution, x, static=True, binary_kernel="u1")
    (layer,) = layer_executions(ir, compile_ir(ir))
    assert layer.runs_as == "u1"
    found = compile_ir(ir)([x.numpy()])[0]
    np.testing.assert_allclose(found, convolution.eval()(x).detach().numpy(), rtol=1e-6)


def test_a_sign_that_differs_is_found():
    network, x = trained(Network("bidrb")), torch.rand(1, 3, 12, 20)
    ir = convert(network, x)
    name = "body.1.steps.0.convolutions.0"
    (signs,) = (n for n in ir.get_ops() if n.get_friendly_name() == f"signs/{name}")
    levels = [signs.input(index) for index in (3, 4)]
    sources = [port.get_source_output() for port in levels]
    for port, source in zip(levels, reversed(sources), strict=True):
        port.replace_source_output(source)
    complaint = check_parity(network, ir, [x]).complaint()
    assert complaint is not None
    assert name in complaint


def test_thresholds_stay_exact_where_floats_are_halved():
    network, x = trained(Network("bidrb")), torch.rand(1, 3, 12, 20)
    ir = convert(network, x)
    halve(ir)
    parity = check_parity(network, ir, [x])
    parity.raise_if_broken()
    assert [layer.error for layer in parity.layers] == [0.0] * 4
    assert [layer.runs_as for layer in layer_executions(ir, compile_ir(ir))].count("int8") == 4


def test_kernels_of_one_bit_take_one_size_alone():
    with pytest.raises(InputError, match=r"binary_kernel='u1'.*one size.*static"):
        convert(BinarizedConv2d(8, 8), torch.rand(1, 8, 8, 8), binary_kernel="u1")


def test_a_convolution_called_twice_is_written_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.convolution = BinarizedConv2d(8, 8)

        def forward(self, x):
            return self.convolution(self.convolution(x)) + x

    network, x = Twice().eval(), torch.randn(1, 8, 8, 8)
    ir = convert(network, x)
    names = {node.get_friendly_name() for node in ir.get_ops()}
    assert {"signs/convolution", "signs/convolution#1"} <= names
    found = ov.Core().compile_model(ir, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})([x.numpy()])[0]
    np.testing.assert_allclose(found, network(x).detach().numpy(), atol=1e-6)
