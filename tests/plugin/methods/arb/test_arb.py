import re
from dataclasses import replace

import pytest
import torch

from condiquant_plugin import InputError
from condiquant_plugin.layerwise.moments import weight_matrix
from condiquant_plugin.methods.arb.method import ARB
from weight_problems import problem

KINDS = [
    ARB(4, refinement=refinement, bitmaps=bitmaps)
    for refinement in ("rounding", "billm", "arb", "arb_x", "arb_rc")
    for bitmaps in ("none", "group", "column_group")
]


def name_of(method):
    return f"{method.refinement} {method.bitmaps}"


@pytest.mark.parametrize("method", [replace(kind, group_size=8) for kind in KINDS], ids=name_of)
@pytest.mark.parametrize("kind", ["linear", "grouped"])
def test_the_stored_parts_are_the_weight_and_every_bit_is_counted(method, kind):
    asked = problem(kind, bias=kind == "linear")
    (solution,) = method.solve([asked])
    form = solution.form
    assert solution.weight.shape == asked.weight.shape
    assert solution.bias is asked.bias
    again = form.with_tensors({name: t.clone() for name, t in form.tensors().items()})
    assert torch.equal(again.dense(), solution.weight)
    change = weight_matrix(solution.weight - asked.weight, asked.geometry).double()
    gram = asked.moments.gram
    weight = weight_matrix(asked.weight, asked.geometry).double()
    error = float(((change @ gram) * change).sum() / ((weight @ gram) * weight).sum())
    assert solution.report.output_error == pytest.approx(error, rel=1e-3)

    groups, rows, features = weight.shape
    blocks, salient = features // 8, 0
    bits = weight.numel()
    element_groups = {"none": 1, "group": 3, "column_group": 4}[method.bitmaps]
    planes = {"none": 1, "group": 4, "column_group": 6}[method.bitmaps]
    if method.bitmaps != "none":
        salient = int(form.flags(form.salient).sum())
        assert 0 < salient < groups * features
        split = groups * features - (salient if method.bitmaps == "group" else 0)
        bits += groups * features + salient * rows + split * rows
    bits += 16 * groups * rows * blocks * planes
    if method.refinement == "arb_rc":
        inner = 4 if method.bitmaps == "column_group" else 2
        outer = 1 if method.bitmaps == "none" else 2
        bits += 16 * (outer * (groups * features - salient) + inner * salient)
    elif method.refinement != "rounding":
        bits += 16 * groups * rows * blocks * element_groups
    assert solution.report.bits_per_weight == pytest.approx(bits / weight.numel())


@pytest.mark.parametrize("method", [k for k in KINDS if k.bitmaps == "column_group"], ids=name_of)
def test_the_weight_is_what_the_blocks_were_fitted_to(method):
    fitted = []

    class Watched(ARB):
        def fit(self, block):
            fitted.append(super().fit(block))
            return fitted[-1]

    (solution,) = Watched(8, refinement=method.refinement, bitmaps=method.bitmaps).solve(
        [problem()]
    )
    blocks = torch.cat([block.dense() for block in fitted], -1)[0]
    assert torch.allclose(solution.weight, blocks, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("refinement", ["arb", "arb_x", "arb_rc"])
def test_refinement_is_worth_it(refinement):
    asked = [problem("tall", seed=seed) for seed in range(4)]

    def total(method):
        return sum(s.report.output_error for s in method.solve(asked))

    plain = ARB(8, refinement="billm", bitmaps="column_group")
    assert total(replace(plain, refinement=refinement)) < total(plain)
    without = total(replace(plain, compensation="none"))
    assert max(total(plain), total(replace(plain, compensation="billm"))) < without


def test_one_matrix_of_signs_is_what_kernels_know():
    (found,) = ARB(8).solve([problem()])
    assert found.form.has_kernel
    codes = found.form.codes()
    assert codes.dtype == torch.int8
    assert set(codes.unique().tolist()) == {-1, 1}
    scale = found.form.row_scales[..., 0].float().repeat_interleave(8, -1)
    dense = codes * scale * found.form.column_scales.float()
    assert torch.equal(dense[0], found.weight)
    for other in (ARB(8, refinement="arb"), ARB(8, bitmaps="group")):
        assert not other.solve([problem()])[0].form.has_kernel


@pytest.mark.parametrize("method", [ARB(8), ARB(8, refinement="arb", bitmaps="group")])
def test_a_low_rank_residual_lowers_the_error_and_is_counted(method):
    asked = problem("tall")
    (plain,) = method.solve([asked])
    (corrected,) = replace(method, residual_rank=3).solve([asked])
    assert corrected.report.output_error < 0.8 * plain.report.output_error
    more = corrected.report.bits_per_weight - plain.report.bits_per_weight
    assert more == pytest.approx(16 * 3 * (12 + 32) / (12 * 32))
    form = corrected.form
    again = form.with_tensors({name: t.clone() for name, t in form.tensors().items()})
    assert torch.equal(again.dense(), corrected.weight)
    assert torch.allclose(
        form.dense(),
        form.base.dense() + (form.residual.left.float() @ form.residual.right.float())[0],
    )


def test_layers_of_one_shape_are_solved_as_if_alone():
    asked = [problem(seed=seed, name=f"{seed}") for seed in range(3)]
    method = ARB(8, bitmaps="column_group")
    for layer, together in zip(asked, method.solve(asked), strict=True):
        (alone,) = method.solve([layer])
        assert together.report.name == layer.name
        assert torch.allclose(together.weight, alone.weight, atol=1e-5)


def test_inputs_that_are_all_zero_leave_plain_signs():
    asked = problem()
    nothing = replace(asked.moments, gram=torch.zeros_like(asked.moments.gram))
    (solution,) = ARB(8, refinement="rounding").solve([replace(asked, moments=nothing)])
    assert torch.equal(solution.weight.sign(), asked.weight.sign())


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: ARB(group_size=0), "group_size=0: use at least 1"),
        (lambda: ARB(damping=0), "damping=0: use more than 0"),
        (lambda: ARB(rounds=-1), "rounds=-1: use 0 or more"),
        (lambda: ARB(residual_rank=-2), "residual_rank=-2: use 0 or more"),
        (lambda: ARB(refinement="arbx"), "refinement='arbx' is not known: use 'rounding' or"),
        (lambda: ARB(bitmaps="both"), "bitmaps='both' is not known: use 'none' or"),
        (lambda: ARB(quantiles=(0.5, 1.0)), "quantiles=(0.5, 1.0): use numbers between 0 and 1"),
        (
            lambda: ARB(6).solve([problem()]),
            "group_size=6 does not divide the 16 inputs of layer: use 8, or leave the layer out",
        ),
        (
            lambda: ARB(8, residual_rank=17).solve([problem()]),
            "residual_rank=17 is more than the smaller side of layer: use at most 16",
        ),
        (
            lambda: ARB(8).solve([replace(problem(), weight=torch.full((24, 16), torch.nan))]),
            "NaN or Inf in the weight of layer",
        ),
        (
            lambda: ARB(8).solve([replace(problem(), weight=torch.full((24, 16), 1e6))]),
            "the scales of layer do not fit in float16 (largest weight 1e+06): leave it out",
        ),
    ],
)
def test_bad_input_is_named_in_one_line(build, words):
    with pytest.raises(InputError, match=re.escape(words)) as caught:
        build()
    assert "\n" not in str(caught.value)
