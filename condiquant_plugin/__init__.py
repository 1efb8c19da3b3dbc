"""CondiQuant: make a super-resolution network ready for 2-4 bits (arXiv 2502.15478). Knows no host.

What needs torch is loaded when it is asked for: running an IR needs none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from condiquant_plugin.errors import InputError
from condiquant_plugin.moved import forward

forward(
    __name__,
    {
        "bounds": "uniform.bounds",
        "distributed": "layerwise.distributed",
        "fake_quantizer": "uniform.fake_quantizer",
        "gram": "layerwise.moments",
        "grid": "uniform.grid",
        "reconditioning": "methods.condiquant.reconditioning",
        "sampling": "uniform.sampling",
        "scope": "layerwise.scope",
        "spectrum": "methods.condiquant.spectrum",
    },
)

if TYPE_CHECKING:
    from condiquant_plugin.uniform.fake_quantizer import FakeQuantizer, fake_quantizers

__version__ = "0.1.0"
__all__ = ["FakeQuantizer", "InputError", "__version__", "fake_quantizers"]


def __getattr__(name: str) -> Any:
    if name in ("FakeQuantizer", "fake_quantizers"):
        from condiquant_plugin.uniform import fake_quantizer

        return getattr(fake_quantizer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
