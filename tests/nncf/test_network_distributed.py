"""``quantize_network`` in one, two and three processes."""

import pytest
import torch

import condiquant_nncf as host
import processes
from condiquant_plugin import InputError
from condiquant_plugin.methods.condiquant.reconditioning import ReconditioningConfig
from networks import build, skewed

CASES = {
    "swinir": ("swinir", "least_squares"),
    "swinir, condition": ("swinir", "condition"),
    "edsr": ("edsr", "least_squares"),
    "edsr, condition": ("edsr", "condition"),
    "skewed": ("skewed", "least_squares"),
}
PAIRS = [(2, case) for case in CASES] + [(3, "edsr"), (3, "edsr, condition")]
COUNTS = (1, 2, 3)


def images(count):
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def config(name, objective):
    scope = "transformer" if name == "swinir" else "all"
    settings = objective and ReconditioningConfig(objective, steps=20)
    return host.QuantizationConfig(scope=scope, recondition=settings, equalize=name == "skewed")


def network(name):
    return skewed() if name == "skewed" else build(name)


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
    # Batches of two for moments alone, of four for networks: the last processes have none.
    result = {"swinir": moments("swinir", images(5)), "edsr": moments("edsr", images(2))}
    result["networks"], result["reports"], result["chosen"] = {}, {}, {}
    for case, (name, objective) in CASES.items():
        if (torch.distributed.get_world_size(), case) in [*PAIRS, (1, case)]:
            settings = config(name, objective)
            quantized = host.quantize_network(network(name), images(9), settings)
            result["chosen"][case] = quantized.calibration.chosen
            result["networks"][case] = quantized.model.state_dict()
            result["reports"][case] = [
                (r.name, r.condition_before, r.condition_after, r.output_error)
                for r in quantized.reports
            ]
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
@pytest.mark.parametrize("name", ["swinir", "edsr"])
def test_moments_are_those_of_one_process(results, count, name):
    alone = results[1][0][name]
    for result in results[count]:
        assert result[name].keys() == alone.keys()
        for layer, expected in alone.items():
            assert result[name][layer]["samples"] == expected["samples"] > 0
            assert_close(result[name][layer]["gram"], expected["gram"])
            assert_close(result[name][layer]["total"], expected["total"])


@pytest.mark.parametrize(("count", "case"), PAIRS)
def test_networks_are_those_of_one_process(results, count, case):
    found, expected = (results[n][0]["networks"][case] for n in (count, 1))
    trained = network(CASES[case][0]).state_dict()
    changed = {n for n in trained if n.endswith("weight") and not trained[n].equal(expected[n])}
    reports, as_alone = (results[n][0]["reports"][case] for n in (count, 1))
    assert {f"{name}.weight" for name, *_ in reports} <= changed
    chosen = results[count][0]["chosen"][case]
    assert chosen.endswith("equalized") == (case == "skewed")
    assert (len(changed) > len(reports)) == (case == "skewed")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if value.is_floating_point():
            assert_close(found[name], value)
    for (name, *values), (same_name, *same_values) in zip(reports, as_alone, strict=True):
        assert name == same_name
        assert values == pytest.approx(same_values, rel=1e-5)


@pytest.mark.parametrize(("count", "case"), PAIRS)
def test_networks_are_the_same_bits_in_all_processes(results, count, case):
    first, *others = (result["networks"][case] for result in results[count])
    for other in others:
        assert other.keys() == first.keys()
        assert not [name for name, value in first.items() if not other[name].equal(value)]


@pytest.mark.parametrize("count", COUNTS[1:])
def test_input_errors_reach_all_processes_as_in_one(results, count):
    (alone,) = results[1]
    assert "NaN or Inf in the calibration images" in alone["errors"][0]
    assert all(result["errors"] == alone["errors"] for result in results[count])
