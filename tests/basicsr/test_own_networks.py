"""Networks of one's own: ``FILE.py:Class`` as the type of ``network_g``."""

import sys

import pytest
import torch
from basicsr.utils.registry import ARCH_REGISTRY
from torch import nn

from condiquant_basicsr import build_network, load_network, network_scale, pad_multiple
from condiquant_basicsr.value_range import in_range
from errors_in_one_line import message_of
from networks import build

NET = '''
import torch
from basicsr.utils.registry import ARCH_REGISTRY
from torch import nn
import scale_of_neighbour
from .blocks import Block


@ARCH_REGISTRY.register()
class EDSR(nn.Module):
    def __init__(self, features, scale=scale_of_neighbour.SCALE):
        super().__init__()
        self.head = Block(3, features)
        self.tail = nn.Sequential(Block(features, 3 * scale**2), nn.PixelShuffle(scale))

    def forward(self, x):
        return self.tail(self.head(x))


class Wide(EDSR):
    def __init__(self, extra=0, **kwargs):
        super().__init__(**kwargs)


class Windowed(EDSR):
    """Windows of 12 that no attribute names."""

    def forward(self, x):
        b, c, h, w = x.shape
        windows = x.view(b, c, h // 12, 12, w // 12, 12)
        return super().forward(windows.reshape(b, c, h, w))


class Padding(EDSR):
    """Pads by itself, in front of windows of 4."""

    def forward(self, x):
        h, w = x.shape[2:]
        padded = nn.functional.pad(x, (0, -w % 4, 0, -h % 4))
        b, c, rows, columns = padded.shape
        windows = padded.view(b, c, rows // 4, 4, columns // 4, 4)
        return super().forward(windows.reshape(b, c, rows, columns))[..., : 2 * h, : 2 * w]


class Flooring(EDSR):
    """Loses odd rows without a word."""

    def forward(self, x):
        return super().forward(x[..., : x.shape[2] // 2 * 2, : x.shape[3] // 2 * 2])


def made(features):
    return EDSR(features, scale=3)


def broken():
    return 3
'''


@pytest.fixture
def net(tmp_path):
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "blocks.py").write_text(
        "from torch import nn\n\ndef Block(a, b):\n    return nn.Conv2d(a, b, 3, padding=1)\n"
    )
    (tmp_path / "scale_of_neighbour.py").write_text("SCALE = 2\n")
    return tmp_path / "net.py"


def test_a_class_in_a_file_with_its_neighbours(net):
    edsr = ARCH_REGISTRY.get("EDSR")
    network = build_network({"type": f"{net}:EDSR", "features": 4})
    assert network.head.out_channels == 4
    assert network_scale(network) == 2
    assert ARCH_REGISTRY.get("EDSR") is edsr is not type(network)
    assert network_scale(build_network({"type": f"{net}:made", "features": 4})) == 3
    assert str(net.parent) not in sys.path


def test_weights_are_loaded_into_it(net, tmp_path):
    section = {"type": f"{net}:EDSR", "features": 4}
    expected = build_network(section)
    torch.save({"params": expected.state_dict()}, tmp_path / "net.pth")
    loaded, scale = load_network(section, str(tmp_path / "net.pth"))
    assert scale == 2
    x = torch.rand(1, 3, 9, 7)
    with torch.no_grad():
        assert torch.equal(loaded(x), expected(x))
    message = message_of(load_network, section | {"features": 5}, str(tmp_path / "net.pth"))
    assert "does not fit network_g" in message
    assert "head.weight is (4, 3, 3, 3) instead of (5, 3, 3, 3)" in message


@pytest.mark.parametrize(
    ("name", "arguments", "named"),
    [
        ("EDSR", {"featurs": 4}, "no argument 'featurs': did you mean features?; it takes features, scale"),
        ("EDSR", {}, "missing 1 required positional argument: 'features'); it takes features, scale"),
        ("Wide", {"feature": 4}, "has no argument 'feature'"),
        ("Edsr", {}, "net.py has no class Edsr: use EDSR or Wide or"),
        ("broken", {}, "gives a int, not a torch.nn.Module"),
        ("9", {}, "write FILE.py:Class"),
    ],
)  # fmt: skip
def test_what_cannot_be_built_is_one_line(net, name, arguments, named):
    assert named in message_of(build_network, {"type": f"{net}:{name}", **arguments})


@pytest.mark.parametrize("code", ["import no_such_module", "1 / 0", "exit()", "def f(:"])
def test_code_that_fails_is_one_line(tmp_path, code):
    (tmp_path / "bad.py").write_text(code)
    assert "the code of bad.py fails (" in message_of(
        build_network, {"type": f"{tmp_path}/bad.py:A"}
    )
    assert "no such file" in message_of(build_network, {"type": f"{tmp_path}/none.py:A"})


def test_arguments_of_a_base_are_known(net):
    network = build_network({"type": f"{net}:Wide", "extra": 1, "features": 4, "scale": 3})
    assert network_scale(network) == 3


@pytest.mark.parametrize(
    ("name", "multiple"), [("EDSR", 1), ("Windowed", 12), ("Padding", 1), ("Flooring", 2)]
)
def test_multiples_are_measured(net, name, multiple):
    network = build_network({"type": f"{net}:{name}", "features": 2})
    assert pad_multiple(network) == multiple


def test_windows_that_are_not_enough_are_measured(swinir):
    class Coarse(nn.Module):
        """Its windows lie in a level of half the size."""

        def __init__(self):
            super().__init__()
            self.body = swinir

        def forward(self, x):
            return nn.functional.interpolate(
                self.body(nn.functional.avg_pool2d(x, 2)), scale_factor=2
            )

    network = Coarse().train()
    network.body.eval()
    assert pad_multiple(swinir) == 8
    assert pad_multiple(network) == 16
    assert network.training
    assert not network.body.training


def test_several_outputs_are_refused_by_name(net):
    net.write_text(NET + "\n\nclass Two(EDSR):\n    def forward(self, x):\n        return x, x\n")
    message = message_of(network_scale, build_network({"type": f"{net}:Two", "features": 2}))
    assert "Two returns a tuple of 2 instead of one image: wrap it" in message


@pytest.mark.parametrize(
    "output", [lambda x: (x, x), lambda x: x.repeat_interleave(3, 2), lambda x: x[0]]
)
def test_what_enlarges_nothing_is_not_tried_at_all_sizes(output):
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.calls = nn.Parameter(torch.ones(1)), 0

        def forward(self, x):
            self.calls += 1
            return output(self.weight * x)

    network = Other()
    assert pad_multiple(network) == 1
    assert network.calls < 20


def test_measuring_changes_no_running_statistics():
    network = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.PixelShuffle(2))
    assert pad_multiple(network.train()) == 1
    assert network[1].num_batches_tracked == 0
    assert network[1].training


@pytest.mark.parametrize(
    ("img_range", "mean"), [(255.0, None), (1.0, [0.4, 0.5, 0.3]), (255.0, [0.4])]
)
def test_a_range_around_a_network(img_range, mean):
    network, x = build("compact"), torch.rand(2, 3, 8, 8)
    middle = torch.tensor(mean or [0.0]).view(1, -1, 1, 1)
    around = in_range(network, img_range, mean)
    with torch.no_grad():
        expected = network((x - middle) * img_range) / img_range + middle
        torch.testing.assert_close(around(x), expected)
    assert network_scale(around) == 2
    assert in_range(network, 1.0, None) is network
