"""Ranks for a budget of parameters: adaCR, with what clipping takes away given back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction

from condiquant_plugin.errors import InputError

_HALVINGS = 100


def rank_of(ratio: float, rows: int, features: int) -> int | None:
    """Rank that keeps ``ratio`` of the parameters, at least 1; None where factors are not smaller."""
    exact = Fraction(ratio).limit_denominator(10**9) * rows * features / (rows + features)
    rank = max(int(exact), 1)
    return rank if rank * (rows + features) < rows * features else None


def kept_parameters(rank: int | None, rows: int, features: int) -> int:
    """Of a layer: of its factors, or of all of it."""
    return rows * features if rank is None else rank * (rows + features)


def adaptive_ratio(importance: float, ratio: float, least: float) -> float:
    """adaCR: ``mrr + I_n (trr - mrr)``, at most 1.

    Args:
        importance: ``I_n``, of mean 1 over the layers.
        ratio: ``trr``, retained on average.
        least: ``mrr``, retained at least.
    """
    return min(least + importance * (ratio - least), 1.0)


def layer_ratios(
    importances: Sequence[float], sizes: Sequence[int], ratio: float, least: float
) -> list[float]:
    """:func:`adaptive_ratio` of every layer, with ``sum ratio_l sizes_l = ratio sum sizes``.

    Clipping at 1 leaves the mean of adaCR below its target. Here all importances are scaled alike until
    it is met.

    Args:
        importances: of each layer, not negative.
        sizes: parameters of each.

    Raises:
        InputError: see :func:`check_ratio`; ``least`` not in [0, ratio].
    """
    check_ratio("ratio", ratio)
    if not 0 <= least <= ratio:
        raise InputError(f"least_ratio={least}: use 0 to ratio={ratio}")
    if ratio == 1 or ratio == least or not any(importances):
        return [ratio] * len(sizes)
    target = ratio * sum(sizes)

    def scaled(scale: float) -> list[float]:
        return [adaptive_ratio(scale * x, ratio, least) for x in importances]

    def total(scale: float) -> float:
        return sum(r * s for r, s in zip(scaled(scale), sizes, strict=True))

    high = 1.0
    limit = sum(s if x > 0 else least * s for x, s in zip(importances, sizes, strict=True))
    if limit <= target:
        rest = sum(s for x, s in zip(importances, sizes, strict=True) if x == 0)
        spare = (target - (sum(sizes) - rest)) / rest if rest else 1.0
        return [1.0 if x > 0 else spare for x in importances]
    while total(high) < target:
        high *= 2
    low = 0.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if total(middle) < target else (low, middle)
    return scaled(high)


def ranks_for(
    ratios: Mapping[str, float], shapes: Mapping[str, tuple[int, int]], ratio: float
) -> dict[str, int | None]:
    """Ranks of all layers, together as near below ``ratio`` of the parameters as ranks allow.

    What rounding down leaves is given back rank by rank, to the layer furthest below its ratio first.

    Args:
        ratios: of each layer, :func:`layer_ratios`.
        shapes: ``(rows, features)`` of each.
        ratio: of all together.

    Returns:
        A rank, or None for a layer that stays dense.
    """
    ranks = {name: rank_of(ratios[name], *shapes[name]) for name in shapes}
    budget = Fraction(ratio).limit_denominator(10**9) * sum(m * n for m, n in shapes.values())
    used = sum(kept_parameters(ranks[name], *shapes[name]) for name in shapes)
    # A layer that stays dense keeps more than its ratio; the others make up for it.
    while used > budget and (over := _furthest(ranks, ratios, shapes, lambda r, _: r > 1)):
        used -= sum(shapes[over])
        ranks[over] -= 1  # type: ignore[operator]

    def fits(rank: int, shape: tuple[int, int]) -> bool:
        return (rank + 1) * sum(shape) < shape[0] * shape[1] and used + sum(shape) <= budget

    while name := _furthest(ranks, ratios, shapes, fits, below=True):
        ranks[name] += 1  # type: ignore[operator]
        used += sum(shapes[name])
    return ranks


def _furthest(
    ranks: Mapping[str, int | None],
    ratios: Mapping[str, float],
    shapes: Mapping[str, tuple[int, int]],
    allowed: Callable[[int, tuple[int, int]], bool],
    *,
    below: bool = False,
) -> str | None:
    """The layer furthest above its ratio, or below it, among those whose rank may change."""
    gaps = {
        name: kept_parameters(rank, *shapes[name]) / (shapes[name][0] * shapes[name][1])
        - ratios[name]
        for name, rank in ranks.items()
        if rank is not None and allowed(rank, shapes[name])
    }
    return (min if below else max)(gaps, key=gaps.__getitem__) if gaps else None


def check_ratio(name: str, ratio: float) -> None:
    """Raise :class:`InputError` outside (0, 1]."""
    if not 0 < ratio <= 1:
        raise InputError(f"{name}={ratio}: use more than 0 and at most 1")
