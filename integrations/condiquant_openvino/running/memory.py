"""How large a tile may be in the memory that is free."""

from __future__ import annotations

from contextlib import suppress
from math import isqrt, prod
from pathlib import Path

import openvino as ov

_CGROUP = Path("/sys/fs/cgroup")
_SHARE = 0.5


def free_memory() -> int:
    """Bytes that this process may still take, of the machine or of the container it runs in."""
    import psutil

    free = int(psutil.virtual_memory().available)
    with suppress(OSError, ValueError):
        limit, used = (int((_CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        free = min(free, max(limit - used, 0))
    return free


def largest_tile(model: ov.Model, bounds: range, streams: int, free: int | None = None) -> int:
    """Height and width of a tile whose activations fit into half of the free memory.

    Args:
        model: static, of one tile of the least size.
        bounds: sizes to choose from, the least first.
        streams: tiles that are computed at once.
        free: bytes; by default :func:`free_memory`.
    """
    budget = _SHARE * (free_memory() if free is None else free) / streams
    fitting = bounds.start * isqrt(int(budget / max(peak_bytes(model), 1) * 2**20)) // 2**10
    return max([size for size in bounds if size <= fitting], default=bounds.start)


def peak_bytes(model: ov.Model) -> int:
    """Most bytes of activations that are alive at once, operator by operator, of a static model."""
    order = model.get_ordered_ops()
    last_use = {
        value.get_node().get_name(): index
        for index, node in enumerate(order)
        for value in node.input_values()
    }
    alive: dict[str, int] = {}
    peak = 0
    for index, node in enumerate(order):
        name = node.get_name()
        if node.get_type_name() != "Constant":
            alive[name] = sum(
                prod(port.get_shape()) * port.get_element_type().size for port in node.outputs()
            )
            peak = max(peak, sum(alive.values()))
        for gone in [held for held in alive if last_use.get(held, index) <= index]:
            del alive[gone]
    return peak
