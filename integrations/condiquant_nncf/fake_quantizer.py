"""The fake quantizer as NNCF's hooks want it."""

from __future__ import annotations

from typing import Any

from nncf.torch.layer_utils import StatefulModuleInterface

from condiquant_plugin.uniform.fake_quantizer import FakeQuantizer


class HookFakeQuantizer(FakeQuantizer, StatefulModuleInterface):
    """A fake quantizer that ``nncf.torch.get_config`` describes and ``load_from_config`` restores."""

    def get_config(self) -> dict[str, Any]:
        """Arguments of the constructor; the bounds are in the ``state_dict``."""
        names = "bits kind row_blocks axis side name zero_on_grid overflow transforms softmax"
        return {name: getattr(self, name) for name in names.split()}

    @classmethod
    def from_config(cls, state: dict[str, Any]) -> HookFakeQuantizer:
        """Inverse of :meth:`get_config`."""
        return cls(**state)
