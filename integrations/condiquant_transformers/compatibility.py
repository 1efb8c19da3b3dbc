"""What transformers expects of other packages."""

from __future__ import annotations

from contextlib import suppress

from condiquant_plugin.torchvision_operators import import_torchvision


def heal() -> None:
    """Make torchvision importable where it is installed: transformers imports it then."""
    with suppress(ImportError):
        import_torchvision()
