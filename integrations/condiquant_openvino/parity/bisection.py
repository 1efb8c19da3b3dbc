"""The first layer in which an IR differs from the simulation, as in ``git bisect``.

Each step compiles the part of the IR that one quantizer's input is computed from: more outputs than that
one would change what the plugin fuses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import openvino as ov
from torch import Tensor, nn

from condiquant_openvino.markers import PRODUCTS
from condiquant_openvino.parity.cutting import OUTPUT, Runner, cut_sets
from condiquant_openvino.parity.example import Example
from condiquant_openvino.parity.layers import quantized_products
from condiquant_openvino.parity.simulation import Rounding


@dataclass(frozen=True)
class Difference:
    """What ``layers`` are given agrees, what they give does not."""

    layers: tuple[str, ...]
    """Products by the labels of their quantizers; where none is, the operator."""
    place: str
    """What they give it to: the label of a quantizer, or ``OUTPUT``."""
    error: float
    """Mean absolute difference over the value range."""
    tolerance: float
    """What rounding explains."""

    def __str__(self) -> str:
        return (
            f"the first layer that differs is {' or '.join(self.layers)}: what it gives to "
            f"{self.place} is off by {self.error:.1e} of the value range, rounding explains "
            f"{self.tolerance:.1e}"
        )


def find_first_difference(
    model: nn.Module, ir: ov.Model, inputs: Sequence[Tensor], runner: Runner, rounding: Rounding
) -> Difference | None:
    """Search between cuts, those first where ties carry least, and if nothing shows, from the image.

    Args:
        inputs: images, shape ``(1, channels, height, width)``; tried one after the other.
        rounding: what the IR may differ by is taken from it.

    Returns:
        None if every part agrees.
    """
    for cut in (True, False):
        for image in inputs:
            example = Example(model, ir, image, runner.device)
            for cuts in reversed(cut_sets(ir, example.probe_points)) if cut else [[]]:
                tolerances = example.rounded(cuts, rounding).tolerances()
                if (found := _find(example, runner, cuts, tolerances)) is not None:
                    return found
    return None


def _find(
    example: Example, runner: Runner, cuts: Sequence[str], tolerances: Mapping[str, float]
) -> Difference | None:
    """A place that agrees clears all that it is computed from, and nothing else.

    The search halves what is computed before one that differs.
    """
    search = _Search(example, runner, cuts, tolerances)
    ends = [*cuts, OUTPUT]
    differing = search.differing(ends)
    bad = next((place for place in differing if search.differing([place])), None)
    if bad is None:
        return None
    cleared = search.before(*(place for place in ends if place not in differing))
    while left := search.before(bad) - cleared - {bad}:
        sizes = {place: len(search.before(place) & left) for place in left}
        middle = min(left, key=lambda place: (abs(2 * sizes[place] - len(left)), place))
        if search.differing([middle]):
            bad = middle
        else:
            cleared |= search.before(middle)
    return search.difference(bad, cleared)


class _Search:
    """The graph of the nodes that round; a place is the name of one, or ``OUTPUT``."""

    def __init__(
        self,
        example: Example,
        runner: Runner,
        cuts: Sequence[str],
        tolerances: Mapping[str, float],
    ) -> None:
        self._example, self._runner, self._tolerances = example, runner, tolerances
        self._pieces = example.pieces(cuts)
        self._exits = {point.exit for point in example.probe_points}
        self._worst: dict[str, tuple[str, float, float]] = {}
        places = {point.entry for point in example.probe_points} - set(cuts)
        self._above: dict[str, frozenset[str]] = {}
        for name, node in self._pieces.nodes.items():
            sources = [value.get_node().get_friendly_name() for value in node.input_values()]
            own = frozenset({name} & places)
            self._above[name] = own.union(*(self._above.get(s, frozenset()) for s in sources))

    def before(self, *places: str) -> frozenset[str]:
        """Places themselves and all uncut ones that they are computed from."""
        sources = (self._pieces.source(place).get_node().get_friendly_name() for place in places)
        return frozenset(places).union(*(self._above.get(s, frozenset()) for s in sources))

    def differing(self, places: Sequence[str]) -> list[str]:
        """Those where something else arrives, by the worst of the quantizers that one node serves."""
        ports = [self._pieces.source(place) for place in places]
        tensors = self._pieces.run(ports, self._example.image, self._runner)
        for place, tensor in zip(places, tensors, strict=True):
            errors = self._example.errors(place, tensor).items()
            triples = [(label, error, self._tolerances[label]) for label, error in errors]
            self._worst[place] = max(triples, key=lambda triple: triple[1] / triple[2])
        return [p for p in places if not self._worst[p][1] <= self._worst[p][2]]

    def difference(self, bad: str, cleared: frozenset[str]) -> Difference:
        """The layers between what is cleared and ``bad``."""
        agreeing = {name for place in cleared for name in self._stretch(place)}
        stretch = self._stretch(bad) - agreeing
        nodes = [node for name, node in self._pieces.nodes.items() if name in stretch]
        products = [node for node in nodes if node.get_type_name() in PRODUCTS]
        others = products or [self._pieces.source(bad).get_node()]
        layers = [layer.name for layer in quantized_products(nodes)] or [
            node.get_friendly_name() for node in others
        ]
        return Difference(tuple(layers), *self._worst[bad])

    def _stretch(self, place: str) -> set[str]:
        """Names of the operators between a place and the quantizers before it."""
        stretch: set[str] = set()
        pending: list[ov.Node] = [self._pieces.source(place).get_node()]
        while pending:
            node = pending.pop()
            name = node.get_friendly_name()
            if name not in stretch and name not in self._exits:
                stretch.add(name)
                pending += [value.get_node() for value in node.input_values()]
        return stretch
