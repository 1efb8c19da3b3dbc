"""The core's fake quantizer as what Brevitas' proxies call."""

from __future__ import annotations

from typing import Any

import torch
from brevitas import config
from brevitas.core.bit_width import BitWidthConst
from brevitas.core.function_wrapper import Identity
from brevitas.core.quant import IntQuant
from torch import Tensor, nn

from condiquant_plugin.errors import InputError
from condiquant_plugin.uniform import bounds, grid
from condiquant_plugin.uniform.fake_quantizer import FakeQuantizer
from condiquant_plugin.uniform.sampling import Sample


class StatefulFakeQuantizer(FakeQuantizer):
    """Saves its bounds only once they are known, and honours ``brevitas.config.IGNORE_MISSING_KEYS``."""

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        if not self.search_on_next_input or config._FULL_STATE_DICT:
            super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        *args: Any,
    ) -> None:
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, *args
        )
        names = [prefix + "lower", prefix + "upper"]
        if all(name in state_dict for name in names):
            self.search_on_next_input = False
        elif config.IGNORE_MISSING_KEYS:
            missing_keys[:] = [key for key in missing_keys if key not in names]


class LearnedBoundsQuant(nn.Module):
    """``tensor_quant`` of the learned-bounds quantizers: a :class:`FakeQuantizer` in Brevitas' terms.

    Bounds are searched (DOBI) on what ``calibration_mode`` shows, else on the first forward. They are
    trained through the quantized value; scale and zero point carry no gradient.

    Args:
        bit_width: 2 to 8; see :class:`FakeQuantizer` for 8.
        kind, side, row_blocks, axis, zero_on_grid, overflow, name: those of :class:`FakeQuantizer`.

    Raises:
        InputError: bits outside 2-8, or Brevitas' JIT is on.
    """

    def __init__(
        self,
        bit_width: int,
        kind: grid.Kind,
        side: bounds.Side = "symmetric",
        row_blocks: int = 1,
        axis: int = 0,
        zero_on_grid: bool = False,
        overflow: grid.Overflow = grid.DEFAULT_OVERFLOW,
        name: str = "",
    ) -> None:
        super().__init__()
        if config.JIT_ENABLED:
            raise InputError("learned bounds do not work with BREVITAS_JIT=1: unset it")
        self.quantizer = StatefulFakeQuantizer(
            bit_width,
            kind,
            row_blocks=row_blocks,
            axis=axis,
            side=side,
            name=name,
            zero_on_grid=zero_on_grid,
            overflow=overflow,
        )
        self.quantizer.search_on_next_input = True
        self.bit_width_impl = BitWidthConst(self.quantizer.bits)
        # Proxies and exporters ask it for the integer format.
        self.int_quant = IntQuant(narrow_range=False, signed=False, input_view_impl=Identity())
        self.observer_only = False
        self._sample: Sample | None = None

    @property
    def init_done(self) -> bool:
        """Whether the bounds are known; GPxQ refuses a quantizer before that."""
        return not self.quantizer.search_on_next_input

    def init_scale(self) -> None:
        """Search the bounds on what was observed; ``calibration_mode`` calls it on exit."""
        if self._sample is not None:
            entries, self._sample = self._sample.entries(), None
            self._move_to(entries.device)
            self.quantizer.search_bounds(entries)
            self.quantizer.search_on_next_input = False

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The quantized value, scale, zero point (not an integer in general) and bit width."""
        if self.observer_only:
            self._observe(x)
        elif self.init_done or x.ndim:  # Brevitas reads scales with a 0-d probe
            self._move_to(x.device)
            value = self.quantizer(x).type_as(x)
            return value, *self._grid(x)
        return x, *self._grid(x)

    def _observe(self, x: Tensor) -> None:
        if x.ndim:
            self._sample = self._sample or Sample()
            self._sample.add(x)

    def _move_to(self, device: torch.device) -> None:
        """Bounds yet unknown follow the data: layers may be built on the meta device."""
        if not self.init_done and self.quantizer.lower.device != device:
            self.quantizer.to_empty(device=device)

    def _grid(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        quantizer = self.quantizer
        snapped = quantizer.snapped(x if x.ndim else None)
        scale = quantizer.spread(snapped.step, x)
        zero_point = quantizer.spread(snapped.zero / snapped.refinement, x)
        return scale, zero_point, self.bit_width_impl()
