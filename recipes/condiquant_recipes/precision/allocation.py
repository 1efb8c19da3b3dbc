"""One of several options for every layer: the exact optimum, by SciPy's integer programs (HiGHS)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from condiquant_plugin.layerwise.precision import LayerBits

_GAP = 1e-6
_SECONDS = 20


@dataclass(frozen=True)
class Option:
    """Bits that a layer may have."""

    bits: LayerBits
    error: float
    """What they add to the squared error of the network's output."""
    cost: float
    """In bytes, or any other unit that adds up."""


def allocate(
    options: Mapping[str, Sequence[Option]],
    lowest: Literal["cost", "error"],
    limit: float,
) -> dict[str, Option] | None:
    """The option of every layer whose sum of one figure is lowest, the sum of the other within a limit.

    Args:
        options: of every layer, at least one.
        lowest: which sum; the other one is limited.

    Returns:
        ``None`` where no choice keeps to the limit.
    """
    items = [(name, option) for name, given in options.items() for option in given]
    errors = np.array([option.error for _, option in items])
    costs = np.array([option.cost for _, option in items])
    wanted, limited = (costs, errors) if lowest == "cost" else (errors, costs)
    scale = float(limited.max(initial=0)) or 1.0
    places = {name: row for row, name in enumerate(options)}
    one_each = np.zeros((len(places), len(items)))
    for column, (name, _) in enumerate(items):
        one_each[places[name], column] = 1
    result = milp(
        wanted / (float(wanted.max(initial=0)) or 1.0),
        integrality=np.ones(len(items)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(limited[None] / scale, -np.inf, limit / scale),
        ],
        options={"mip_rel_gap": _GAP, "time_limit": _SECONDS},
    )
    if result.x is None:
        return None
    chosen = np.flatnonzero(result.x > 0.5)
    return {items[column][0]: items[column][1] for column in chosen}
