"""CondiQuant: make a super-resolution network ready for 2-4 bits (arXiv 2502.15478). Knows no host."""

from condiquant_plugin.errors import InputError
from condiquant_plugin.moved import forward
from condiquant_plugin.uniform.fake_quantizer import FakeQuantizer, fake_quantizers

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

__version__ = "0.1.0"
__all__ = ["FakeQuantizer", "InputError", "__version__", "fake_quantizers"]
