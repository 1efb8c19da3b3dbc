"""``quantize_network`` in one, two and three processes."""

from dataclasses import asdict

import pytest
import torch

import condiquant_nncf as host
import processes
from condiquant_plugin import InputError, fake_quantizers
from condiquant_plugin.reconditioning import ReconditioningConfig
from networks import build

OBJECTIVES = ("condition", "least_squares")
CASES = {
    f"{name} {objective}": (name, objective)
    for name in ("swinir", "edsr")
    for objective in OBJECTIVES
}
COUNTS = (1, 2, 3)


def images(count):
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def config(name, objective):
    scope = "transformer" if name == "swinir" else "all"
    settings = objective and ReconditioningConfig(objective, steps=20)
    return host.QuantizationConfig(scope=scope, recondition=settings)


def moments(name, crops):
    wrapped = host.wrap(build(name), crops[:1])
    layers = config(name, None).find_layers(wrapped)
    found = host.collect_moments(wrapped, layers, crops.split(2))
    return {layer: vars(value) for layer, value in found.items()}


def error_of(crops):
    with pytest.raises(InputError) as caught:
        host.quantize_network(build("edsr"), crops, config("edsr", "condition"), bounds_crops=4)
    return str(caught.value)


def work(rank, folder):
    result = {"moments": moments("swinir", images(5)), "too few": moments("edsr", images(2))}
    for case, (name, objective) in CASES.items():
        # Two batches of four: the last of three processes has none.
        quantized = host.quantize_network(build(name), images(8), config(name, objective))
        result[case] = quantized.model.state_dict()
        result[f"{case} reports"] = [asdict(report) for report in quantized.reports]
    spoilt = images(8)
    spoilt[6, 0, 3, 3] = float("inf")  # in the batch of process 1 alone
    result["errors"] = [error_of(spoilt), error_of(images(0))]
    torch.save(result, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each process found, by the number of processes."""
    found = {}
    for count in COUNTS:
        folder = tmp_path_factory.mktemp(f"processes{count}")
        assert processes.run(work, folder, count) == [0] * count
        files = [folder / f"{rank}.pt" for rank in range(count)]
        found[count] = [torch.load(file, weights_only=True) for file in files]
    return found


def assert_close(found, expected, tolerance=1e-6):
    assert (found - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("count", COUNTS[1:])
@pytest.mark.parametrize("key", ["moments", "too few"])
def test_moments_are_those_of_one_process(results, count, key):
    (alone,) = results[1]
    for result in results[count]:
        assert result[key].keys() == alone[key].keys()
        for layer, expected in alone[key].items():
            assert result[key][layer]["samples"] == expected["samples"] > 0
            assert_close(result[key][layer]["gram"], expected["gram"])
            assert_close(result[key][layer]["total"], expected["total"])


@pytest.mark.parametrize("count", COUNTS[1:])
@pytest.mark.parametrize("case", CASES)
def test_networks_are_those_of_one_process(results, count, case):
    (alone,) = results[1]
    found, expected = results[count][0][case], alone[case]
    trained = build(CASES[case][0]).state_dict()
    changed = {name for name in trained if not torch.equal(trained[name], expected[name])}
    assert len(changed) >= len(alone[f"{case} reports"])
    assert found.keys() == expected.keys()
    for name in expected:
        if expected[name].is_floating_point():
            assert_close(found[name], expected[name])
    for one, other in zip(
        results[count][0][f"{case} reports"], alone[f"{case} reports"], strict=True
    ):
        assert one.pop("name") == other.pop("name")
        assert one == pytest.approx(other, rel=1e-5)


@pytest.mark.parametrize("count", COUNTS[1:])
@pytest.mark.parametrize("case", CASES)
def test_networks_are_the_same_bits_in_all_processes(results, count, case):
    first, *others = results[count]
    for other in others:
        assert other[case].keys() == first[case].keys()
        for name, value in first[case].items():
            assert torch.equal(other[case][name], value), name


@pytest.mark.parametrize("count", COUNTS[1:])
def test_input_errors_reach_all_processes_as_in_one(results, count):
    for result in results[count]:
        assert result["errors"] == results[1][0]["errors"]
    assert "NaN or Inf in the input of" in results[1][0]["errors"][0]
