"""One option for every layer."""

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from condiquant_plugin.layerwise.precision import LayerBits
from condiquant_recipes.precision.allocation import Option, allocate

figures = st.integers(0, 50)
options = st.lists(
    st.lists(st.tuples(figures, figures), min_size=1, max_size=4), min_size=1, max_size=4
)


@settings(max_examples=60, deadline=None)
@given(options, st.integers(0, 200), st.sampled_from(["cost", "error"]))
def test_the_optimum_is_that_of_trying_all(given_options, limit, lowest):
    layers = {
        f"layer{i}": [Option(LayerBits(2, 2), error * 1e-6, cost) for error, cost in each]
        for i, each in enumerate(given_options)
    }
    unit = {"cost": 1.0, "error": 1e-6}
    limited = "error" if lowest == "cost" else "cost"
    bound = limit * unit[limited]
    sums = [
        (sum(getattr(o, lowest) for o in choice), sum(getattr(o, limited) for o in choice))
        for choice in product(*layers.values())
    ]
    allowed = [value for value, other in sums if other <= bound * (1 + 1e-9)]
    found = allocate(layers, lowest, bound)
    if not allowed:
        assert found is None
        return
    assert found.keys() == layers.keys()
    assert all(option in layers[name] for name, option in found.items())
    assert sum(getattr(o, limited) for o in found.values()) <= bound + 1e-4 * unit[limited]
    best = sum(getattr(o, lowest) for o in found.values())
    assert best == pytest.approx(min(allowed), rel=1e-4, abs=1e-4 * unit[lowest])
