"""How long a run is expected to take."""

import re
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from condiquant_plugin.errors import InputError
from condiquant_recipes import expected_time as module
from condiquant_recipes.expected_time import ExpectedTime, expected_time
from condiquant_recipes.recipe import Recipe, with_overrides
from networks import build

seconds = st.floats(0.01, 1e4)


@given(seconds, seconds, st.floats(0.1, 600))
def test_iterations_fit_into_the_minutes_and_two_digits(untrained, per_iteration, minutes):
    expected = ExpectedTime(untrained, per_iteration)
    if untrained > 60 * minutes:
        with pytest.raises(InputError, match="without training it is expected to take"):
            expected.iterations_within(minutes)
        return
    count = expected.iterations_within(minutes)
    assert untrained + count * per_iteration <= 60 * minutes * (1 + 1e-9)
    assert untrained + (1.1 * count + 2) * per_iteration > 60 * minutes
    assert not str(count)[2:].strip("0")


@given(seconds, seconds, st.integers(0, 1000))
def test_the_range_in_words_is_the_range(untrained, per_iteration, iterations):
    expected = ExpectedTime(untrained, per_iteration)
    low, high, unit = re.fullmatch(
        r"(\d+) to (\d+) (s|min|h)", expected.text(iterations)
    ).groups()  # fmt: skip
    factor = {"s": 1, "min": 60, "h": 3600}[unit]
    middle = untrained + iterations * per_iteration
    assert int(low) * factor <= max(middle, factor)
    assert int(high) * factor >= middle
    first, last = expected.seconds(iterations)
    assert first < middle < last


class Waiting(nn.Module):
    """Takes its time for every pixel, as networks do."""

    def __init__(self, body, per_pixel):
        super().__init__()
        self.body, self.per_pixel = body, per_pixel

    def forward(self, x):
        time.sleep(self.per_pixel * x[0, 0].numel())
        return self.body(x)


def test_it_goes_by_the_network_and_by_what_is_done():
    recipe = Recipe(
        name="a", scale=2, path={"pretrain_network_g": "a.pth"}, condiquant={"scope": "all"}
    )
    crops = torch.rand(1, 3, 32, 32)

    def of(*changes, network=build("compact"), slow=1):  # noqa: B008
        waiting = Waiting(network, slow * 2e-5)
        return expected_time(waiting, with_overrides(recipe, changes), crops)

    plain = of()
    assert of(slow=4).per_iteration == pytest.approx(4 * plain.per_iteration, rel=0.5)
    more = of("datasets.calibration.count=1280")
    assert more.untrained == pytest.approx(10 * plain.untrained, rel=0.5)
    assert of("condiquant.distillation.batch_size=8").per_iteration > 2 * plain.per_iteration
    assert of("condiquant.scope=transformer").untrained < 0.2 * plain.untrained


def test_moments_cost_what_inputs_are_to_outputs():
    first, middle, last = (27, 16), (144, 16), (144, 12)
    layers = [first, *[middle] * 3, last]
    expected = sum(i * i for i, _ in layers) / sum(i * o for i, o in layers)
    assert module._moments(build("compact"), "all") == pytest.approx(expected)
    assert module._moments(build("compact"), "transformer") == 0
    assert module._moments(nn.Linear(6, 3), "transformer") == 2


def test_moments_of_wide_convolutions_cost_less_than_their_inputs_are():
    cost = {
        (padding, channels): module._moments(nn.Conv2d(channels, 64, 3, padding=padding), "all")
        for padding in (0, 1)
        for channels in (56, 64, 256)
    }
    assert cost[0, 64] == 64 * 9 / 64
    assert cost[1, 56] == cost[0, 56]  # narrow
    assert cost[1, 64] < 0.2 * cost[0, 64]
    assert cost[1, 256] < 0.1 * cost[0, 256]
