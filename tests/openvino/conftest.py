import copy

import openvino as ov
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from condiquant_openvino import convert
from condiquant_plugin import FakeQuantizer


class Quantized(nn.Module):
    """A layer with fake quantizers on its input and its weight; bits 0 leaves either float."""

    def __init__(self, layer, bits, *, input_bits=None, row_blocks=1, axis=0, between=None):
        super().__init__()
        self.layer, self.between = layer, between
        input_bits = bits if input_bits is None else input_bits
        self.input = FakeQuantizer(input_bits, "activation") if input_bits else nn.Identity()
        if bits:
            quantizer = FakeQuantizer(bits, "weight", row_blocks=row_blocks, axis=axis)
            parametrize.register_parametrization(layer, "weight", quantizer)

    def forward(self, x):
        x = self.input(x)
        return self.layer(x if self.between is None else self.between(x))


class ConvolutionNet(nn.Module):
    """Every kind of convolution, a linear layer and PixelShuffle."""

    def __init__(self, bits):
        super().__init__()
        self.head = nn.Conv2d(3, 16, 3, padding=1)
        self.plain = Quantized(nn.Conv2d(16, 16, 3, padding=1), bits)
        self.grouped = Quantized(nn.Conv2d(16, 16, 3, padding=1, groups=4), bits, row_blocks=16)
        self.depthwise = Quantized(nn.Conv2d(16, 16, 3, padding=1, groups=16), bits, row_blocks=4)
        self.linear = Quantized(nn.Linear(16, 48), bits, row_blocks=3)
        self.back = Quantized(nn.Linear(48, 16), bits, row_blocks=16)
        transposed = nn.ConvTranspose2d(16, 8, 4, stride=2, padding=1, groups=2)
        self.transposed = Quantized(transposed, bits, row_blocks=4, axis=1)
        self.wide = Quantized(nn.ConvTranspose2d(8, 12, 2, stride=1), bits, row_blocks=12, axis=1)
        self.shuffle = nn.PixelShuffle(2)

    def forward(self, x):
        x = self.head(x)
        x = x + self.plain(x).relu()
        x = x + self.grouped(x)
        x = self.depthwise(x)
        y = self.back(nn.functional.gelu(self.linear(x.permute(0, 2, 3, 1))))
        return self.shuffle(self.wide(self.transposed(x + y.permute(0, 3, 1, 2))))


def search_bounds(model, images):
    """DOBI on one forward pass."""
    for module in model.modules():
        if isinstance(module, FakeQuantizer):
            module.search_on_next_input = True
    with torch.no_grad():
        model(images)
    return model.eval()


@pytest.fixture
def quantized():
    """``quantized(layer, x, bits, ...)``: one quantized layer, bounds found on ``x``."""
    return lambda layer, x, bits, **options: search_bounds(Quantized(layer, bits, **options), x)


@pytest.fixture
def convolution_net():
    return lambda bits: search_bounds(ConvolutionNet(bits), torch.rand(1, 3, 16, 16))


@pytest.fixture(scope="session")
def _exported():
    torch.manual_seed(0)
    x = torch.rand(1, 3, 16, 16)
    model = search_bounds(ConvolutionNet(4), x)
    return model, convert(model, x), x


@pytest.fixture
def exported_convolutions(_exported):
    """A 4-bit convolution net, its IR and an input; copies that a test may change."""
    model, ir, x = _exported
    return copy.deepcopy(model), ir.clone(), x


@pytest.fixture(scope="session", autouse=True)
def _no_telemetry():
    """OpenVINO reports every conversion to its makers, unless it runs in CI; offline that takes 1 s."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CI", "true")
        yield


@pytest.fixture(autouse=True)
def _one_thread():
    """OpenVINO's threads and spinning OpenMP threads slow each other down."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run():
    """Output of a model compiled as users would: default properties, f32."""

    def infer(model, x):
        network = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        return torch.from_numpy(network([x.numpy()])[0])

    return infer
