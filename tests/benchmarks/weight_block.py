"""What one block of a Llama takes to compress: seconds of its passes, of solving, peak memory.

python tests/benchmarks/weight_block.py MODE [--width 4096] [--hidden 11008] [--heads 32] [--tokens 2048]

Random weights and tokens of a small vocabulary: costs are those of the shapes. One block is in memory.
"""

import argparse
import resource
import time

import torch

from condiquant_plugin.compression import CompressionConfig
from condiquant_plugin.layerwise.blocks import solve_block_by_block
from condiquant_transformers.compatibility import heal

heal()

from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

GIB = 2**20


class Timed:
    """A method, and the CPU seconds that it solves in."""

    def __init__(self, method):
        self.method, self.seconds = method, 0.0

    def __getattr__(self, name):
        return getattr(self.method, name)

    def solve(self, problems):
        started = time.process_time()
        try:
            return self.method.solve(problems)
        finally:
            self.seconds += time.process_time() - started


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("mode")
    for name, value in (("width", 4096), ("hidden", 11008), ("heads", 32), ("tokens", 2048)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--bitmaps", action="store_true")
    given = parser.parse_args()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=given.width, intermediate_size=given.hidden,
        num_hidden_layers=1, num_attention_heads=given.heads, num_key_value_heads=given.heads,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(96, (given.tokens // 512, 512))
    method = Timed(CompressionConfig(given.mode, bitmaps=given.bitmaps, adaptive=False).method())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / GIB
    started = time.process_time()
    solve_block_by_block(
        model,
        [{"input_ids": row[None], "use_cache": False} for row in ids],
        method,
        inputs="original",
    )
    busy = time.process_time() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / GIB
    parameters = sum(p.numel() for p in model.model.layers.parameters())
    print(
        f"{given.mode}: {parameters / 1e6:.1f} M parameters, {given.tokens} tokens: passes and moments "
        f"{busy - method.seconds:.1f} CPU s, solving {method.seconds:.1f} CPU s, peak {peak:.1f} GiB "
        f"({before:.1f} before)"
    )


if __name__ == "__main__":
    main()
