"""Low-rank factors of one bit: what ``diag(h) U diag(l) V diag(g)`` with signs U and V loses.

CONDIQUANT_DATA=... python tests/benchmarks/binary_factors.py

Layers of SmolLM2-135M's third block, on its own inputs for 8 windows of WikiText-2's valid.txt. From the
closed form of that rank: both factors rotated towards their signs by one orthogonal matrix, then least
squares for one and the other, each followed by signs and the rank-one approximation of magnitudes; the best
of all rounds. Beside it ARB-RC and GPTQ at 2 bits, groups of 64. One bit for every weight, both factors
together, is rank mn / (m + n).
"""

import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from condiquant_plugin.compression import CompressionConfig
from condiquant_plugin.layerwise.blocks import solve_block_by_block
from condiquant_plugin.layerwise.problem import Dense, LayerReport, OnGramMatrices, Solution
from condiquant_plugin.methods.adasvd.low_rank import ClosedForm, balanced
from condiquant_plugin.methods.arb.refinement import arb_rc
from condiquant_transformers import read_folder, windows
from condiquant_transformers.text import batches_of

sys.path.insert(0, str(Path(__file__).parents[1]))
import smollm2

LAYERS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
ROTATIONS, ROUNDS, RC_ROUNDS = 30, 20, 6


class Keep(OnGramMatrices):
    """Changes nothing, and remembers."""

    needs_quantized_inputs = False

    def __init__(self):
        self.problems = {}

    def solve(self, problems):
        self.problems.update({p.name: p for p in problems})
        return [Solution(Dense(p.weight), p.bias, LayerReport(p.name)) for p in problems]


def binarized(factor):
    return arb_rc(factor[None], torch.ones_like(factor[None]), RC_ROUNDS).dense()[0]


def rotation(left, right):
    """Orthogonal, for columns of ``left`` and rows of ``right`` that are near their signs."""
    both = torch.cat([left, right.mT])
    found = torch.linalg.qr(torch.randn(both.shape[1], both.shape[1], dtype=both.dtype))[0]
    for _ in range(ROTATIONS):
        turned = both @ found
        u, _, v = torch.linalg.svd((turned.sign() * turned.abs().mean()).mT @ both)
        found = (u @ v).mT
    return found


def least_error(weight, gram, rank):
    def error(left, right):
        change = left @ right - weight
        return float(((change @ gram) * change).sum() / ((weight @ gram) * weight).sum())

    left, right = (part[0] for part in balanced(*ClosedForm.of(weight[None], gram[None]).cut(rank)))
    turn = rotation(left, right)
    left, right = binarized(left @ turn), binarized(turn.mT @ right)
    errors = [error(left, right)]
    for _ in range(ROUNDS):
        left = binarized(weight @ gram @ right.mT @ torch.linalg.pinv(right @ gram @ right.mT))
        right = binarized(torch.linalg.pinv(left) @ weight)
        errors.append(error(left, right))
    return min(errors)


def main():
    torch.manual_seed(0)
    text = Path(os.environ["CONDIQUANT_DATA"]) / "wikitext2" / "valid.txt"
    with TemporaryDirectory() as folder:
        model = read_folder(smollm2.save_model(Path(folder), blocks=3))
    keep = Keep()
    ids = windows(model.tokenizer, text, length=512, count=8)
    solve_block_by_block(model.model, batches_of(ids), keep, inputs="original")
    print("| layer | ARB-RC, 1.27 bits | GPTQ, 2.28 bits | factors, 1 bit | factors, 2 bits |")
    print("|---|---|---|---|---|")
    for name in LAYERS:
        problem = keep.problems[f"model.layers.2.{name}"]
        errors = [
            CompressionConfig(mode, bits=bits).method().solve([problem])[0].report.output_error
            for mode, bits in (("arb_rc", None), ("gptq", 2))
        ]
        weight, gram = problem.weight.double(), problem.moments.gram[0] / problem.moments.samples
        rows, features = weight.shape
        gram = gram + 0.01 * gram.diagonal().mean() * torch.eye(features, dtype=gram.dtype)
        for bits in (1, 2):
            rank = min(bits * rows * features // (rows + features), rows, features)
            errors.append(least_error(weight, gram, rank))
        print(f"| {name} | {' | '.join(f'{value:.3f}' for value in errors)} |", flush=True)


if __name__ == "__main__":
    main()
