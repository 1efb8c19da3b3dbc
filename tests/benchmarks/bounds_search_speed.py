"""DOBI on a histogram against 100 passes over the tensor, in the same run.

python tests/benchmarks/bounds_search_speed.py
"""

import time

import torch

from condiquant_plugin.uniform import bounds, grid


def passes(x: torch.Tensor, bits: int, one_sided: bool) -> tuple[float, torch.Tensor, torch.Tensor]:
    """Every candidate by one pass over the whole tensor."""
    low, high = x.min(), x.max()
    best = (float("inf"), low, high)
    for i in range(bounds.CANDIDATES):
        shrink = (high - low) * i / bounds.CANDIDATES
        lower, upper = (low, high - shrink) if one_sided else (low + shrink / 2, high - shrink / 2)
        snapped = grid.snap(lower, upper, bits, "activation")
        error = snapped.quantize(x).sub_(x).square_().sum()
        if float(error) < best[0]:
            best = float(error), lower, upper
    return best


def main() -> None:
    torch.set_num_threads(2)
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(32, 1024, 180, generator=generator)
    softmax = torch.randn(8, 3, 256, 256, generator=generator).mul(3).softmax(-1)
    gelu = torch.nn.functional.gelu(normal)
    for name, data, side in (
        ("layer norm output", normal, "symmetric"),
        ("softmax map", softmax, "one_sided"),
        ("GELU output", gelu, "one_sided"),
    ):
        for bits in (4, 2):
            bounds.search(data.reshape(1, -1), bits, "activation", side=side)
            started = time.perf_counter()
            found = bounds.search(data.reshape(1, -1), bits, "activation", side=side)
            fast = time.perf_counter() - started
            started = time.perf_counter()
            exhaustive, _, _ = passes(data, bits, side == "one_sided")
            slow = time.perf_counter() - started
            snapped = grid.snap(found.lower, found.upper, bits, "activation")
            error = snapped.quantize(data).sub_(data).square_().sum()
            print(
                f"{name}, {data.numel() / 1e6:.1f}M values, {bits} bits: {slow / fast:.0f}x faster, "
                f"squared error {float(error) / exhaustive:.4f} of the exhaustive search's"
            )


if __name__ == "__main__":
    main()
