from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from condiquant_plugin.methods.compression import feedback
from condiquant_plugin.methods.compression.feedback import (
    change_of_later,
    compensation_factor,
    compress_by_blocks,
    damped,
)
from condiquant_plugin.methods.compression.stacks import output_loss, stacks
from weight_problems import matrices, problem

seeds = st.integers(0, 2**16)


@given(seed=seeds, start=st.integers(0, 11), width=st.integers(1, 4))
def test_exact_compensation_is_the_minimum_and_billms_is_not_below_it(seed, start, width):
    error, gram = matrices(seed)
    hessian = damped(gram, 0.01)
    factor, end = compensation_factor(hessian), start + width
    error = error[..., start:end]

    def loss(later):
        whole = torch.cat([-error, later], -1)
        # Columns before the block stand as they are: their share of H is out of reach.
        return float(output_loss(whole, hessian[:, start:, start:]))

    exact, theirs, none = (
        change_of_later(error, factor, start, end, kind) for kind in ("exact", "billm", "none")
    )
    rest, cross = hessian[:, end:, end:], hessian[:, start:end, end:]
    assert torch.allclose(exact, error @ cross @ torch.linalg.inv(rest), rtol=1e-6, atol=1e-8)
    bound = loss(exact) * (1 - 1e-9) - 1e-9
    assert bound <= loss(theirs)
    assert bound <= loss(none)
    if width == 1:
        assert torch.allclose(exact, theirs)


def test_blocks_see_what_is_left_and_the_damped_gram_matrix():
    weight, gram = matrices(1)
    seen = []

    class Zeros:
        def __init__(self, block):
            seen.append(block)

        def dense(self):
            return torch.zeros_like(seen[-1].weight)

    compress_by_blocks(weight, gram, 4, Zeros, compensation="exact", damping=0.01)
    hessian = damped(gram, 0.01)
    factor = compensation_factor(hessian)
    rest = weight.clone()
    for index, block in enumerate(seen):
        a, b = 4 * index, 4 * index + 4
        assert torch.allclose(block.weight.double(), rest[..., a:b], atol=1e-3)
        assert torch.allclose(block.gram.double(), hessian[:, a:b, a:b], rtol=1e-5)
        diagonal = factor[:, a:b, a:b].diagonal(dim1=-2, dim2=-1)
        assert torch.allclose(block.sensitivity.double(), 1 / diagonal[:, None] ** 2, rtol=1e-4)
        rest[..., b:] += change_of_later(rest[..., a:b], factor, a, b, "exact")


def test_the_factor_is_that_of_the_inverse():
    hessian = damped(matrices(2)[1], 0.01)
    factor = compensation_factor(hessian)
    assert torch.equal(factor, factor.triu())
    assert torch.allclose(factor.mT @ factor, torch.linalg.inv(hessian))


def test_inputs_that_are_all_zero_still_have_a_factor():
    factor = compensation_factor(damped(torch.zeros(1, 4, 4, dtype=torch.float64), 0.01))
    assert torch.equal(factor, torch.eye(4, dtype=torch.float64)[None])


@pytest.mark.parametrize("kind", ["exact", "billm"])
def test_compensation_lowers_the_loss_of_rounding(kind):
    weight, gram = matrices(4, features=32)

    class Rounded:
        def __init__(self, block):
            self.values = block.weight.round()

        def dense(self):
            return self.values

    losses = {}
    for compensation in (kind, "none"):
        parts = compress_by_blocks(
            weight, gram, 4, Rounded, compensation=compensation, damping=0.01
        )
        whole = torch.cat([part.values for part in parts], -1).double()
        losses[compensation] = float(output_loss(whole - weight, gram))
    assert losses[kind] < losses["none"]


@pytest.mark.parametrize("features", [1, 128, 129, 300])
def test_the_factor_is_that_of_the_inverse_whatever_the_size(features):
    hessian = damped(matrices(0, features=features)[1].repeat(2, 1, 1), 0.01)
    hessian[1] *= 3
    factor = compensation_factor(hessian)
    assert torch.equal(factor, factor.triu())
    assert (factor.diagonal(dim1=-2, dim2=-1) > 0).all()
    torch.testing.assert_close(factor.mT @ factor, torch.linalg.inv(hessian), rtol=1e-6, atol=1e-9)


def test_one_gram_matrix_of_several_layers_is_decomposed_once(monkeypatch):
    weights, gram = torch.cat([matrices(seed)[0] for seed in range(3)]), matrices(0)[1]
    sizes = []

    class Halves:
        def __init__(self, block):
            self.block = block

        def dense(self):
            return self.block.weight / 2

    def decomposed(hessian):
        sizes.append(len(hessian))
        return compensation_factor(hessian)

    monkeypatch.setattr(feedback, "compensation_factor", decomposed)

    def compressed(gram):
        blocks = compress_by_blocks(weights, gram, 4, Halves, compensation="exact", damping=0.01)
        return [block.block.weight for block in blocks]

    shared, repeated = compressed(gram.expand(3, -1, -1)), compressed(gram.repeat(3, 1, 1))
    assert sizes == [1, 3]
    for one, other in zip(shared, repeated, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-5)


def test_layers_that_share_moments_have_one_gram_matrix():
    one, other = problem(seed=0), problem(seed=1)
    shared = [one, replace(other, moments=one.moments)]
    (stack,) = stacks(shared)
    assert stack.gram.stride(0) == 0
    (apart,) = stacks([one, other])
    for gram, layer in zip(apart.gram, (one, other), strict=True):
        assert torch.equal(gram, layer.moments.gram[0] / layer.moments.samples)
    assert torch.equal(stack.gram[1], apart.gram[0])
