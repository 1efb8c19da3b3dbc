import copy

import numpy as np
import pytest
import torch
import torch.nn.utils as utils
from torch import nn

from condiquant_plugin import FakeQuantizer, InputError
from condiquant_plugin.intake import (
    check_is_float32,
    check_output,
    image_batch,
    plain_float_copy,
    rebuilt_parameters,
)

X = torch.rand(2, 3, 8, 8)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 3, 1))


def run_once(model):
    model(X)
    return model


def changed(change):
    model = network()
    change(model)
    return model.eval()


def each(function):
    return lambda model: [function(model[place]) for place in (0, 2)]


WRAPPED = {
    "compiled": lambda: torch.compile(network(), backend="eager"),
    "compiled in place": lambda: changed(lambda m: m.compile(backend="eager")),
    "layer compiled": lambda: changed(
        lambda m: m.add_module("2", torch.compile(m[2], backend="eager"))
    ),
    "parallel": lambda: nn.DataParallel(network()),
    "both": lambda: nn.DataParallel(torch.compile(network(), backend="eager")),
    "layer parallel": lambda: changed(lambda m: m.add_module("0", nn.DataParallel(m[0]))),
    "old weight norm": lambda: changed(each(utils.weight_norm)),
    "old weight norm, run": lambda: run_once(changed(each(utils.weight_norm))),
    "old spectral norm": lambda: changed(each(utils.spectral_norm)),
    "old spectral norm, run": lambda: run_once(changed(each(utils.spectral_norm))),
    "weight norm": lambda: changed(each(utils.parametrizations.weight_norm)),
    "spectral norm": lambda: changed(each(utils.parametrizations.spectral_norm)),
    "orthogonal": lambda: changed(each(utils.parametrizations.orthogonal)),
    "pruned": lambda: changed(each(lambda m: utils.prune.l1_unstructured(m, "weight", 0.5))),
    "pruned, run": lambda: run_once(
        changed(each(lambda m: utils.prune.random_unstructured(m, "weight", 0.5)))
    ),
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_a_plain_copy_computes_the_same(kind):
    given = WRAPPED[kind]().eval()
    plain = plain_float_copy(given)
    with torch.no_grad():
        torch.testing.assert_close(plain(X), given(X), rtol=0, atol=1e-6)
    names = [name for name, _ in network().named_parameters()]
    assert sorted(dict(plain.named_parameters())) == sorted(names)
    assert all(isinstance(plain[place], nn.Conv2d) for place in (0, 2))
    copy.deepcopy(plain)
    with torch.no_grad():
        plain[0].weight.zero_()
        assert plain[0](X).std((0, 2, 3)).max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_cast_with_a_word(dtype):
    given = network().to(dtype)
    with pytest.warns(UserWarning, match=f"Sequential has parameters in {dtype}: its float32"):
        plain = plain_float_copy(given)
    assert {t.dtype for t in plain.state_dict().values() if t.is_floating_point()} == {
        torch.float32
    }
    assert given[0].weight.dtype == dtype
    check_is_float32(plain)
    with pytest.raises(InputError, match=r"0\.weight is torch\.\w+: call network\.float\(\)"):
        check_is_float32(given)


def test_a_fake_quantizer_is_not_folded():
    given = changed(
        lambda m: utils.parametrize.register_parametrization(
            m[0], "weight", FakeQuantizer(4, "weight")
        )
    )
    assert any(isinstance(m, FakeQuantizer) for m in plain_float_copy(given).modules())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda m: torch.jit.script(m), "the network is a RecursiveScriptModule of TorchScript"),
        (lambda m: torch.jit.trace(m, X), "of TorchScript: give the nn.Module that it was made"),
        (lambda m: nn.Sequential(nn.ReLU(), torch.jit.script(m)), "1 is a RecursiveScriptModule"),
        (lambda m: torch.export.export(m, (X,)), "the network is a ExportedProgram"),
        (lambda m: torch.export.export(m, (X,)).module(), "the network comes from torch.export"),
        (lambda m: m.state_dict(), "the network is a OrderedDict"),
    ],
)
def test_networks_without_modules_are_refused(make, words):
    with pytest.raises(InputError, match=words) as caught:
        plain_float_copy(make(network().eval()))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "images",
    [
        X,
        X.double(),
        X.half().float().bfloat16(),
        list(X),
        tuple(X.split(1)),
        [X[:1], X[1]],
        X.numpy(),
        X.numpy().astype(np.float64),
        [x.numpy() for x in X],
        X.numpy()[:, :, ::-1],
    ],
)
def test_forms_of_images(images):
    batch = image_batch(images)
    assert (batch.shape, batch.dtype) == (X.shape, torch.float32)


def test_one_image():
    assert image_batch(X[0]).equal(X[:1])
    assert image_batch(X[0].numpy()).equal(X[:1])
    tokens = torch.rand(2, 5, 8)
    linear = nn.Linear(8, 8)
    assert image_batch(tokens, takes=lambda x: linear(x) is not None).equal(tokens)
    assert image_batch(X[0], takes=lambda x: False).equal(X[:1])


@pytest.mark.parametrize(
    ("images", "words"),
    [
        ((X * 255).byte(), r"of torch\.uint8: give floats .*/ 255"),
        ((X * 255).byte().numpy(), r"of torch\.uint8"),
        ((X * 255).long(), r"of torch\.int64"),
        (X > 0.5, r"of torch\.bool"),
        (np.array(["a"]), "of <U1"),
        (X.permute(0, 2, 3, 1), r"channels last: give images\.permute\(0, 3, 1, 2\)"),
        (X[:, :1].permute(0, 2, 3, 1), "channels last"),
        (X[0, 0], r"shape \(8, 8\): give \(count, channels, height, width\)"),
        (X[None], r"shape \(1, 2, 3, 8, 8\)"),
        ([], "no calibration images"),
        (X[:0], "holds no images"),
        (torch.tensor(1.0), "no calibration images"),
        ([X[0], X[1, :, :4]], r"several sizes, \(3, 4, 8\) and \(3, 8, 8\): cut crops of one"),
        (X / 0, "NaN or Inf in the calibration images"),
        (None, "are a NoneType"),
        ("photographs", "are a str"),
        ([X[0], None], "are a NoneType"),
    ],
)
def test_images_that_are_refused(images, words):
    with pytest.raises(InputError, match=words) as caught:
        image_batch(images)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("output", "words"),
    [((X, X), "tuple of 2"), ([X], "list of 1"), ({"x": X}, "dict of 1"), (None, "NoneType")],
)
def test_outputs_that_are_refused(output, words):
    with pytest.raises(InputError, match=f"returns a {words} instead of one image: wrap it"):
        check_output(network(), output)


class Rebuilding(nn.Module):
    """``change`` gives ``layer`` its weight from ``source`` in every forward pass."""

    def __init__(self, change):
        super().__init__()
        self.change = change
        self.layer, self.source, self.other = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        if change is not None:
            change(self)

    def forward(self, x):
        if self.change is not None:
            self.change(self)
        return self.other(self.layer(x))


@torch.no_grad()
def _copied(module):
    module.layer.weight.copy_(module.source.weight)


def _exchanged(module):
    module.layer.weight.data = module.source.weight.data * 2


def _registered(module):
    module.layer.weight = nn.Parameter(module.source.weight.detach().clone())


@pytest.mark.parametrize("change", [_copied, _exchanged, _registered])
def test_weights_that_a_forward_pass_rebuilds(change):
    torch.manual_seed(0)
    model = Rebuilding(change).eval()
    before = copy.deepcopy(model.state_dict())
    assert rebuilt_parameters(model, lambda m: m(X)) == {"layer.weight"}
    assert all(before[name].equal(value) for name, value in model.state_dict().items())
    assert not rebuilt_parameters(Rebuilding(None), lambda m: m(X))


def test_a_network_that_does_not_take_the_images():
    with pytest.raises(InputError, match=r"Sequential does not take an item .*channels") as caught:
        rebuilt_parameters(network(), lambda m: m(X[:, :2]))
    assert "\n" not in str(caught.value)
