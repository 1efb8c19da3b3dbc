import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from condiquant_plugin.uniform.fake_quantizer import FakeQuantizer
from condiquant_plugin.uniform.rotation import orthogonal

HADAMARD = [1, 2, 4, 12, 48, 60, 64, 120, 180, 240]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 300))
def test_columns_are_orthonormal(features):
    matrix = orthogonal(features).double()
    assert (matrix.mT @ matrix - torch.eye(features)).abs().max() < 1e-6
    assert torch.equal(orthogonal(features), matrix.float())


@pytest.mark.parametrize("features", HADAMARD)
def test_all_entries_are_of_one_magnitude_where_a_construction_is_known(features):
    matrix = orthogonal(features)
    torch.testing.assert_close(matrix.abs(), torch.full_like(matrix, features**-0.5))


@pytest.mark.parametrize("features", [50, 90])
def test_a_wide_channel_is_spread_over_all(features):
    x = torch.eye(features)[3]
    assert (x @ orthogonal(features)).abs().max() < 2 * features**-0.5


def test_a_quantizer_transforms_before_its_grid_and_when_it_is_off():
    quantizer = FakeQuantizer(3, "activation", transforms=12)
    plain = FakeQuantizer(3, "activation")
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))
    assert torch.equal(quantizer.transformed(x), x)
    quantizer.set_transform(orthogonal(12), torch.full((12,), 0.5))
    turned = x @ orthogonal(12).mT + 0.5
    quantizer.search_bounds(turned)
    plain.search_bounds(turned)
    torch.testing.assert_close(quantizer(x), plain(turned))
    quantizer.enabled = False
    torch.testing.assert_close(quantizer(x), turned)
    assert set(quantizer.state_dict()) == {"lower", "upper", "matrix", "shift"}
