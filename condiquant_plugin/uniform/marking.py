"""What a node of a quantizer says of itself in the runtime info of its graph, whatever it is called.

Without torch: running a written IR needs none.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from typing import TYPE_CHECKING, cast
from urllib.parse import parse_qsl, urlencode

if TYPE_CHECKING:
    from condiquant_plugin.uniform.grid import Kind

NODE_KEY = "user_datacondiquant"
"""OpenVINO saves and clones what stands under ``user_data``."""
MODEL_KEY = ["condiquant_markers"]
MODEL_VALUE = "1"
"""Of a model whose quantizers, if any, are marked; earlier versions told them by friendly names."""


class Role(StrEnum):
    """What a node of a quantizer does."""

    WHOLE = "fake_quantize.whole"
    """All of it, from values to values: not written for kernels yet."""
    MAIN = "fake_quantize"
    """Rounds an activation, or gives a packed weight."""
    APART = "fake_quantize.apart"
    """In front of what rounds, keeps another operator from taking it in."""
    BYTES = "fake_quantize.bytes"
    POSITION = "fake_quantize.position"
    SCALED = "fake_quantize.scaled"
    EXIT = "fake_quantize.exit"
    """Gives the quantized values of an activation."""
    TRANSPOSED_EXIT = "fake_quantize.transposed_exit"
    """Gives them with the last two axes swapped against the network."""


@dataclass(frozen=True)
class Marker:
    """A node's role and its quantizer, whose fields are None where an earlier version wrote it."""

    role: Role
    label: str
    kind: Kind | None = None
    bits: int | None = None
    refinement: int | None = None
    """Lattice steps in one grid step; None too where a node rounds for several quantizers."""
    zero: tuple[int, ...] = ()
    """Position of zero in lattice steps: one, or one for each of equal blocks of rows; or as above."""

    def to_text(self) -> str:
        """Inverse of :meth:`from_text`."""
        fields = {
            "role": self.role.value,
            "kind": self.kind,
            "bits": self.bits,
            "refinement": self.refinement,
            "zero": ",".join(map(str, self.zero)) or None,
            "label": self.label,
        }
        known = {name: value for name, value in fields.items() if value is not None}
        return urlencode(known, safe="/,")

    @staticmethod
    @cache
    def from_text(text: str) -> Marker:
        """Read what a node carries."""
        fields = dict(parse_qsl(text, keep_blank_values=True))
        bits, refinement = (
            int(fields[name]) if name in fields else None for name in ("bits", "refinement")
        )
        zero = tuple(map(int, fields["zero"].split(","))) if "zero" in fields else ()
        kind = cast("Kind | None", fields.get("kind"))
        return Marker(Role(fields["role"]), fields["label"], kind, bits, refinement, zero)
