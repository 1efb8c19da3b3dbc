"""PBS2P's coarse search: how many of every M weights each layer keeps."""

from __future__ import annotations

from collections.abc import Mapping

from condiquant_plugin.errors import InputError
from condiquant_plugin.methods.adasvd.ranks import layer_ratios


def patterns_for(
    importances: Mapping[str, float],
    sizes: Mapping[str, int],
    target: tuple[int, int],
    spread: int = 1,
) -> dict[str, tuple[int, int]]:
    """N:M of each layer by its importance, at most N of every M kept on average.

    A layer keeps ``R_low + I_n (R_target - R_low)``, rounded down to a whole N; what that leaves goes to
    the layers that lost most by it. No N is further from the target's than ``spread``.

    Args:
        importances: by layer, not negative; ``I_n`` is one of them divided by their mean.
        sizes: parameters, by layer.
        target: N and M on average.

    Raises:
        InputError: ``spread`` below 0.
    """
    n, m = target
    if spread < 0:
        raise InputError(f"spread={spread}: use 0 or more")
    low, high = max(n - spread, 1), min(n + spread, m - 1)
    names = list(sizes)
    ratios = layer_ratios(
        [importances[name] for name in names], [sizes[name] for name in names], n / m, low / m
    )
    wanted = {name: min(ratio * m, high) for name, ratio in zip(names, ratios, strict=True)}
    kept = {name: int(value + 1e-9) for name, value in wanted.items()}
    left = n * sum(sizes.values()) - sum(kept[name] * sizes[name] for name in names)
    while True:
        fitting = [name for name in names if kept[name] < high and sizes[name] <= left]
        if not fitting:
            return {name: (count, m) for name, count in kept.items()}
        name = max(fitting, key=lambda each: wanted[each] - kept[each])
        kept[name] += 1
        left -= sizes[name]
