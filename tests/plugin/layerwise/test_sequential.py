"""Real small networks, in the quantizers of the hosts; the slow way of the same is in ``one_by_one``."""

import copy
import dataclasses
import threading
from functools import partial

import pytest
import torch
from torch import nn

import processes
from condiquant_brevitas import quantize_sr
from condiquant_nncf import QuantizationConfig, insert_quantizers, quantize_network, wrap
from condiquant_nncf.network import quantized_layers
from condiquant_plugin import InputError, fake_quantizers
from condiquant_plugin.layerwise.moments import moments_of
from condiquant_plugin.layerwise.passes import PausedPass, paused
from condiquant_plugin.layerwise.problem import LayerReport
from condiquant_plugin.layerwise.quantized import collect_moments, computing_floats
from condiquant_plugin.layerwise.sequential import solve_in_sequence
from condiquant_plugin.methods.condiquant.reconditioning import ReconditioningConfig, recondition
from condiquant_plugin.uniform.bounds_search import search_bounds
from networks import build

SETTINGS = ReconditioningConfig(damping=1e-2)


def quantized(name, scope, images):
    """A network in NNCF's hooks with bounds, and its layers as the core sees them."""
    config = QuantizationConfig(scope=scope)
    wrapped = wrap(build(name) if isinstance(name, str) else name, images[:1])
    layers = config.find_layers(wrapped)
    model = insert_quantizers(wrapped, layers, config)
    search_bounds(model, list(images.split(1)))
    return model, quantized_layers(model, layers)


def images_for(name, count=4):
    size = {"dat": 32}.get(name, 16)
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def solve(layer, moments):
    (solution,) = recondition([layer.problem(moments)], SETTINGS)
    layer.write(solution)
    layer.weight_quantizer.search_bounds(layer.weight)
    return solution.report


@torch.no_grad()
def inputs(model, layer, images, quantize):
    """What the layer's input quantizer is given, or gives."""
    seen = []

    def note(_, args, output=None):
        seen.append(output if quantize else args[0])

    quantizer = layer.input_quantizers[0]
    hook = quantizer.register_forward_hook if quantize else quantizer.register_forward_pre_hook
    handle = hook(note)
    for batch in images.split(2):
        model(batch)
    handle.remove()
    return torch.cat(seen)


def weaken(seen, layer, moments):
    """A change that does not depend on the moments, whose last bits would decide about ties."""
    seen[layer.name] = moments
    with torch.no_grad():
        layer.weight.mul_(0.75)
    layer.weight_quantizer.search_bounds(layer.weight)
    return LayerReport(layer.name)


def one_by_one(model, layers, images):
    """A whole pass of each network for every layer."""
    seen, original = {}, copy.deepcopy(model)
    modules = {id(q): name for name, q in fake_quantizers(model).items()}
    for layer in layers:
        twin = original.get_submodule(modules[id(layer.input_quantizers[0])])
        with computing_floats(original):
            theirs = dataclasses.replace(layer, input_quantizers=(twin,))
            floats = inputs(original, theirs, images, quantize=False)
        codes = inputs(model, layer, images, quantize=True)
        weaken(seen, layer, moments_of(floats, layer.geometry, codes))
    return seen


@pytest.mark.parametrize(("name", "scope"), [("edsr", "all"), ("swinir", "transformer")])
def test_every_layer_is_solved_on_what_the_network_before_it_gives(name, scope):
    images = images_for(name)
    expected = one_by_one(*quantized(name, scope, images), images)
    model, layers = quantized(name, scope, images)
    alone = collect_moments(model, layers, list(images.split(2))).moments
    found = {}
    reports = solve_in_sequence(model, layers, list(images.split(2)), partial(weaken, found))
    assert [report.name for report in reports] == [layer.name for layer in layers]
    for layer in layers:
        mine, theirs = found[layer.name], expected[layer.name]
        assert mine.samples == theirs.samples
        for field in dataclasses.fields(mine)[1:]:
            ours, other = (getattr(moments, field.name) for moments in (mine, theirs))
            assert (ours - other).norm() <= 1e-5 * other.norm(), (layer.name, field.name)
        if layer is not layers[0]:
            change = mine.quantized_gram - alone[layer.name].quantized_gram
            assert change.norm() > 1e-2 * mine.quantized_gram.norm()
        assert torch.allclose(mine.gram, alone[layer.name].gram)


def test_known_moments_of_the_float_network_are_taken():
    images = images_for("edsr")
    batches = list(images.split(2))
    expected, found = {}, {}
    model, layers = quantized("edsr", "all", images)
    known = collect_moments(model, layers, batches).moments
    solve_in_sequence(model, layers, batches, partial(weaken, expected))
    model, layers = quantized("edsr", "all", images)
    solve_in_sequence(model, layers, batches, partial(weaken, found), known)
    for layer in layers:
        mine, theirs = found[layer.name], expected[layer.name]
        assert mine.gram is known[layer.name].gram
        assert mine.total is known[layer.name].total
        for field in ("quantized_gram", "quantized_cross", "quantized_total", "samples"):
            assert torch.equal(*(torch.as_tensor(getattr(m, field)) for m in (mine, theirs)))


def test_brevitas_quantizes_weights_behind_the_input_all_the_same():
    images = images_for("edsr")
    settings = ReconditioningConfig(inputs="compressed")
    model = quantize_sr(build("edsr"), images, scope="all", recondition=settings)
    wrapped, layers = quantized("edsr", "all", images)
    assert list(model.report) == [layer.name for layer in layers]
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in wrapped.modules())


def test_nothing_is_left_of_the_passes():
    images = images_for("edsr")
    model, layers = quantized("edsr", "all", images)
    before = threading.active_count()
    solve_in_sequence(model, layers, list(images.split(1)), solve)
    assert threading.active_count() == before
    assert all(quantizer.enabled for quantizer in fake_quantizers(model).values())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())

    def fail(layer, moments):
        raise KeyError(layer.name)

    with pytest.raises(KeyError):
        solve_in_sequence(model, layers, list(images.split(1)), fail)
    assert threading.active_count() == before


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.same, self.last = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))

    def forward(self, x):
        return self.last(self.same(self.same(self.first(x))))


def test_a_weight_that_is_used_twice_is_solved_on_the_float_network():
    images = images_for("edsr")
    expected, found = (
        quantize_network(
            Twice(),
            images,
            QuantizationConfig(scope="all", recondition=ReconditioningConfig(inputs=way)),
        )
        for way in ("original", "compressed")
    )
    assert [report.name for report in found.reports] == ["same"]
    assert found.reports == expected.reports
    model, (layer,) = quantized(Twice(), "all", images)
    quantizer = layer.input_quantizers[0]
    once = dataclasses.replace(layer, input_quantizers=(quantizer,))
    model.last.weight_twice = quantizer
    model.last.register_forward_pre_hook(lambda module, args: (module.weight_twice(args[0]),))
    with pytest.raises(InputError, match="called twice"):
        solve_in_sequence(model, [once], [images[:1]], solve)


def test_a_pass_stops_goes_on_and_is_given_up():
    network = build("edsr")
    names = ["body.0.conv1", "body.1.conv2"]
    image = images_for("edsr", 1)
    seen = []
    handles = [
        network.get_submodule(n).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        for n in names
    ]
    expected = network(image)
    for handle in handles:
        handle.remove()
    with paused(network, [image], names) as (one,):
        assert [one.resume()[0], one.resume()[0], one.resume()] == [*names, None]
    with paused(network, [image], names) as (one,):
        name, x = one.resume()
        assert (name, torch.equal(x, seen[0])) == (names[0], True)
        with torch.no_grad():
            network.body[0].conv1.weight.zero_()
        _, x = one.resume()
        assert not torch.equal(x, seen[1])
    assert torch.isfinite(expected).all()
    broken = PausedPass(network, torch.rand(1, 5, 4, 4), names)
    with pytest.raises(RuntimeError, match="must match"):
        broken.resume()
    broken.close()


def _solve_a_share(rank, folder):
    images = images_for("edsr", 3)
    model, layers = quantized("edsr", "all", images)
    reports = solve_in_sequence(model, layers, list(images.split(1)), solve)
    torch.save([report.quantized_output_error_after for report in reports], folder / f"{rank}.pt")
    whole = quantize_network(build("edsr"), images, QuantizationConfig(scope="all"))
    chosen = whole.calibration.chosen, whole.calibration.fidelity
    torch.save((chosen, whole.model.state_dict()), folder / f"{rank}.pth")


@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_the_batches(count, tmp_path):
    images = images_for("edsr", 3)
    model, layers = quantized("edsr", "all", images)
    reports = solve_in_sequence(model, layers, list(images.split(1)), solve)
    assert processes.run(_solve_a_share, tmp_path, count) == [0] * count
    for rank in range(count):
        expected = [report.quantized_output_error_after for report in reports]
        assert torch.load(tmp_path / f"{rank}.pt") == pytest.approx(expected, rel=1e-4)
    (chosen, state), *others = (torch.load(tmp_path / f"{rank}.pth") for rank in range(count))
    for choice, tensors in others:
        assert choice == chosen
        assert all(torch.equal(tensors[name], value) for name, value in state.items())


def test_a_layer_that_is_not_called_is_named():
    images = images_for("edsr")
    model, layers = quantized("edsr", "all", images)
    model.forward = partial(_without_the_body, model)
    with pytest.raises(InputError, match="is not called"):
        solve_in_sequence(model, layers, [images[:1]], solve)


def _without_the_body(model, x):
    return x
