"""Choosing the weights, on real small networks in the quantizers of a host."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from condiquant_basicsr import build_network
from condiquant_nncf import QuantizationConfig, insert_quantizers, quantize_network, wrap
from condiquant_nncf.network import quantized_layers
from condiquant_plugin import InputError, fake_quantizers
from condiquant_plugin.calibration import calibrate, fidelity_in_db, held_out, job
from condiquant_plugin.calibration import images as batching
from condiquant_plugin.calibration.images import few_at_once, sequence_of, together
from condiquant_plugin.methods.condiquant.reconditioning import ReconditioningConfig
from networks import SECTIONS, build

NAMES = ["least squares", "as trained", "least squares, in sequence"]


def crops(count=9, size=16):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def candidate(name):
    """The config that leaves no choice."""
    auto = QuantizationConfig(scope="all").reconditioning()
    settings = dict(
        zip(NAMES, (auto, None, ReconditioningConfig(inputs="compressed")), strict=True)
    )
    return QuantizationConfig(scope="all", recondition=settings[name])


def output(model, images):
    with torch.no_grad():
        return torch.cat([model(image) for image in images.split(1)])


def test_what_is_closest_on_held_out_images_stays():
    network, images = build("edsr"), crops()
    seen, unseen = images[[0, 1, 2, 3, 4, 5, 6, 8]], images[[7]]
    result = quantize_network(network, images, QuantizationConfig(scope="all"))
    found = result.calibration
    assert list(found.fidelity) == NAMES
    assert found.chosen == max(found.fidelity, key=found.fidelity.__getitem__)
    for name in NAMES:
        alone = quantize_network(network, seen, candidate(name))
        assert (alone.calibration.chosen, alone.calibration.fidelity) == (name, {})
        score = fidelity_in_db(output(alone.model, unseen), output(network, unseen))
        assert score == pytest.approx(found.fidelity[name], abs=1e-4)
        if name == found.chosen:
            assert torch.equal(output(alone.model, images), output(result.model, images))
            assert alone.reports == result.reports
            assert alone.calibration.rounding == found.rounding


def test_images_given_as_held_out_leave_all_others_in():
    network, images = build("edsr"), crops()
    config = QuantizationConfig(scope="all")
    given = quantize_network(network, images[:8], config, held_out=images[8:])
    best = candidate(given.calibration.chosen)
    alone = quantize_network(network, images[:8], best)
    assert torch.equal(output(alone.model, images), output(given.model, images))


@pytest.mark.parametrize("worst", NAMES)
def test_no_candidate_is_preferred(monkeypatch, worst):
    """Also what would win is dropped where it scores worst."""
    scores = iter(-1.0 if name == worst else 1.0 for name in NAMES)
    monkeypatch.setattr(job, "fidelity_in_db", lambda *_: next(scores))
    found = quantize_network(build("edsr"), crops(), QuantizationConfig(scope="all")).calibration
    assert found.chosen == next(name for name in NAMES if name != worst)


def test_rounding_can_be_left_out_and_is_reported():
    network, images = build("edsr"), crops(4)
    results = {
        way: quantize_network(
            network, images, QuantizationConfig(scope="all", recondition=None, rounding=way)
        )
        for way in ("gptq", "nearest")
    }
    before = dict(network.named_parameters())
    kept = dict(results["nearest"].model.named_parameters())
    assert all(torch.equal(kept[name], value) for name, value in before.items())
    assert results["nearest"].calibration.rounding == []
    reports = results["gptq"].calibration.rounding
    assert [r.name for r in reports] == [r.name for r in results["gptq"].reports]
    assert all(r.rounding_error < r.nearest_error for r in reports)
    target = output(network, images)
    scores = {n: fidelity_in_db(output(r.model, images), target) for n, r in results.items()}
    assert scores["gptq"] > scores["nearest"]


def test_bounds_belong_to_the_weights_before_rounding():
    images = crops(4)
    ways = [
        QuantizationConfig(scope="all", recondition=None, rounding=w, equalize=False)
        for w in ("gptq", "nearest")
    ]
    rounded, nearest = (
        {
            q.name: q
            for q in fake_quantizers(quantize_network(build("edsr"), images, w).model).values()
        }
        for w in ways
    )
    for name, quantizer in nearest.items():
        assert torch.equal(rounded[name].lower, quantizer.lower)
        assert torch.equal(rounded[name].upper, quantizer.upper)


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_weights_whose_grid_goes_by_them_are_rounded_on_it(granularity):
    network, images = build("edsr"), crops(4)
    config = QuantizationConfig(8, 8, scope="all", recondition=None, weight_granularity=granularity)
    result = quantize_network(network, images, config)
    for report in result.calibration.rounding:
        assert report.rounding_error < report.nearest_error
    assert len(result.calibration.rounding) == len(result.layers)
    for layer in quantized_layers(result.model, result.layers):
        quantizer = layer.weight_quantizer
        assert torch.equal(quantizer.snapped(layer.weight).step, quantizer.snapped().step)


@given(st.integers(1, 70))
def test_every_image_is_calibrated_with_or_held_out(count):
    kept, chosen = held_out(count)
    assert kept
    assert chosen
    assert sorted({*kept, *chosen}) == list(range(count))
    assert count == 1 or not set(kept) & set(chosen)
    assert len(chosen) == max(count // 8, 1)


def test_fidelity_is_in_db():
    target = torch.randn(1, 3, 50, 50)
    noise = torch.randn_like(target)
    noise = noise * target.std(correction=0) / noise.square().mean().sqrt()
    assert fidelity_in_db(target + 0.1 * noise, target) == pytest.approx(20, abs=1e-3)
    assert fidelity_in_db(target, target) == 120
    assert fidelity_in_db(torch.zeros(3), torch.zeros(3)) <= 120


def test_neighbours_of_one_shape_pass_together():
    small, large = torch.rand(1, 3, 4, 4), torch.rand(1, 3, 8, 8)
    pair = (small, small)
    batches = together([small, small, small, large, pair, small], 2)
    sizes = [b.shape[0] if isinstance(b, torch.Tensor) else "pair" for b in batches]
    assert sizes == [2, 1, 1, "pair", 1]
    assert torch.equal(torch.cat(batches[:2]), small.expand(3, -1, -1, -1))


def test_small_images_pass_few_at_once():
    def sizes(images):
        return [len(batch) for batch in few_at_once(images)]

    small = list(torch.rand(20, 3, 32, 32).split(1))
    assert sizes(small) == [8, 8, 4]
    assert sizes([torch.rand(1, 3, 200, 200)] * 2) == [1, 1]
    assert sizes([*small[:3], torch.rand(1, 3, 64, 64)]) == [2, 1, 1]
    assert [len(batch) for batch in few_at_once([torch.rand(1, 3, 200, 200)] * 5, 2)] == [2, 2, 1]
    assert few_at_once([]) == []


def test_a_sequence_holds_a_bounded_number_of_pixels():
    assert sum(len(batch) for batch in sequence_of(list(torch.rand(90, 3, 32, 32).split(1)))) == 64
    assert [len(batch) for batch in sequence_of([torch.rand(1, 1, 300, 300)] * 2)] == [1]
    assert sequence_of([{"x": torch.rand(1, 4)}, {"x": torch.rand(1, 4)}])


def test_images_of_several_sizes_and_of_several_inputs():
    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.network = build("edsr")

        def forward(self, image, gain):
            return self.network(image) * gain

    images = [
        {"image": torch.rand(1, 3, size, size), "gain": torch.tensor(1.5)} for size in (16, 24, 16)
    ]
    config = QuantizationConfig(scope="all")
    wrapped = wrap(Two(), images[0])
    layers = config.find_layers(wrapped)
    model = insert_quantizers(wrapped, layers, config)
    found = calibrate(model, quantized_layers(model, layers), images, config, bounds_images=2)
    assert {name.removesuffix(", equalized") for name in found.fidelity} == set(NAMES)
    with torch.no_grad():
        assert model(**images[1]).isfinite().all()


def test_bounds_of_a_quantized_network_need_one_size():
    config = QuantizationConfig(scope="all", bounds_inputs="quantized", recondition=None)
    wrapped = wrap(build("edsr"), crops(1))
    layers = config.find_layers(wrapped)
    model = insert_quantizers(wrapped, layers, config)
    images = [torch.rand(1, 3, size, size) for size in (16, 24, 16)]
    with pytest.raises(InputError, match='images of one size: use "float"'):
        calibrate(model, quantized_layers(model, layers), images, config, bounds_images=2)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"inputs": "both"}, "inputs='both' is not known: use 'original' or 'compressed'"),
        ({"inputs": "compressed", "objective": "condition"}, 'inputs="compressed" has no effect'),
    ],
)
def test_inputs_that_cannot_be_are_refused(settings, words):
    with pytest.raises(InputError, match=words):
        ReconditioningConfig(**settings)


@torch.no_grad()
def skewed_inside():
    """EDSR whose first block alone has channels of unlike ranges, computing the same."""
    network = build("edsr")
    block = network.body[0]
    factors = torch.ones(16)
    factors[::4] = 30
    block.conv1.weight.mul_(factors.view(-1, 1, 1, 1))
    block.conv1.bias.mul_(factors)
    block.conv2.weight.div_(factors.view(1, -1, 1, 1))
    return network


def test_layers_that_equalizing_leaves_alone_are_collected_and_solved_once(monkeypatch):
    network, images = skewed_inside(), crops()
    config = QuantizationConfig(scope="all", weight_bits=8, activation_bits=8)
    collected, solved = [], []
    collect, solve = job.collect_moments, job.distributed.solve

    def collecting(model, layers, *args, **kwargs):
        collected.append([layer.name for layer in layers])
        return collect(model, layers, *args, **kwargs)

    def solving(problems, method):
        solved.append([problem.name for problem in problems])
        return solve(problems, method)

    monkeypatch.setattr(job, "collect_moments", collecting)
    monkeypatch.setattr(job.distributed, "solve", solving)
    found = quantize_network(network, images, config).calibration
    assert list(found.equalized or {"body.0.conv2": 1}) == ["body.0.conv2"]
    assert len(collected[0]) > 2
    assert collected[1:] == [["body.0.conv2"]]
    several = [names for names in solved if len(names) > 1]
    every, scaled = collected[0], ["body.0.conv1", "body.0.conv2"]
    # Reconditioned and rounded, as they are and with equal channels, and rounded as trained.
    assert several == [every, every, scaled, scaled, every]
    monkeypatch.setattr(job._Start, "shares", lambda *_: False)
    apart = quantize_network(network, images, config).calibration
    assert len(collected) == 4
    assert collected[3] == collected[2]
    assert apart.fidelity == pytest.approx(found.fidelity, abs=0.02)
    assert [r.name for r in found.reports] == [r.name for r in apart.reports]


@pytest.mark.parametrize(("pixels", "known"), [(2**16, True), (4 * 16 * 16, False)])
def test_a_sequence_of_all_images_knows_what_the_float_network_gives(monkeypatch, pixels, known):
    given, solve = [], job.solve_in_sequence

    def solving(*args):
        given.append(args[4])
        return solve(*args)

    monkeypatch.setattr(job, "solve_in_sequence", solving)
    monkeypatch.setattr(batching, "_SEQUENCE_PIXELS", pixels)
    quantize_network(build("edsr"), crops(), candidate(NAMES[2]))
    assert [each is not None for each in given] == [known]


def test_scaled_channels_are_other_inputs_within_the_same_range():
    config = QuantizationConfig(scope="all")
    wrapped = wrap(build("edsr"), crops(1))
    found = config.find_layers(wrapped)
    layer, *_ = quantized_layers(insert_quantizers(wrapped, found, config), found)
    ranges = {layer.name: torch.tensor([-1.0, 2.0])}
    plain = job._Start([], {layer.name: None}, {}, ranges)
    assert job._Start([], {}, {}, ranges).shares(layer, plain)
    assert not job._Start([], {}, {layer.name: 0.5}, ranges).shares(layer, plain)
    wider = {layer.name: torch.tensor([-1.0, 2.1])}
    assert not job._Start([], {}, {}, wider).shares(layer, plain)
    assert not job._Start([], {}, {}, ranges).shares(layer, job._Start([], {}, {}, ranges))


@pytest.mark.parametrize(("channels", "sizes"), [(56, [1] * 8), (57, [8])])
def test_images_are_collected_few_at_once_where_convolutions_are_wide(monkeypatch, channels, sizes):
    collected, collect = [], job.collect_moments

    def collecting(model, layers, batches, **kwargs):
        collected.append([len(batch) for batch in batches])
        return collect(model, layers, batches, **kwargs)

    monkeypatch.setattr(job, "collect_moments", collecting)
    network = build_network(SECTIONS["compact"] | {"num_feat": channels})
    quantize_network(network, crops(8), candidate(NAMES[0]))
    assert collected == [sizes]
