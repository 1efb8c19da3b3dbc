import math

import pytest
import torch

from condiquant_plugin import InputError
from condiquant_plugin.layerwise.moments import weight_matrix
from condiquant_plugin.methods.pbs2p.magnitude import Magnitude
from weight_problems import problem


@pytest.mark.parametrize("kind", ["linear", "tall", "grouped"])
@pytest.mark.parametrize("pattern", [(4, 8), (1, 4), (7, 8)])
def test_the_largest_of_every_group_stay_as_they_are(kind, pattern):
    n, m = pattern
    layer = problem(kind)
    (solution,) = Magnitude(pattern).solve([layer])
    before, after = (
        weight_matrix(weight, layer.geometry).unflatten(-1, (-1, m))
        for weight in (layer.weight, solution.weight)
    )
    kept = after != 0
    assert torch.equal(kept.sum(-1), torch.full_like(kept[..., 0], n, dtype=torch.long))
    assert torch.equal(after[kept], before[kept].half().float())
    lowest = torch.where(kept, before.abs(), torch.inf).amin(-1)
    assert (lowest >= torch.where(kept, 0, before.abs()).amax(-1)).all()
    bits = 16 * n / m + math.log2(math.comb(m, n)) / m
    assert solution.form.bits_per_weight == pytest.approx(bits)


def test_a_pattern_that_does_not_fit_is_named():
    with pytest.raises(InputError, match=r"pattern=3:7 does not divide the 16 inputs of layer"):
        Magnitude((3, 7)).solve([problem()])
    with pytest.raises(InputError, match=r"pattern=8:8 keeps 8 of every 8"):
        Magnitude((8, 8))
