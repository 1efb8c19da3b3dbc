"""CondiQuant: make a super-resolution network ready for 2-4 bits (arXiv 2502.15478). Knows no host."""

from condiquant_plugin.errors import InputError
from condiquant_plugin.fake_quantizer import FakeQuantizer, fake_quantizers

__version__ = "0.1.0"
__all__ = ["FakeQuantizer", "InputError", "__version__", "fake_quantizers"]
