"""How far a quantized network is from the float one on a batch: what every host's training step lowers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.functional import l1_loss
from torch.nn.parallel import DataParallel, DistributedDataParallel

from condiquant_plugin.distillation.features import captured, feature_loss
from condiquant_plugin.distillation.settings import DistillationConfig
from condiquant_plugin.distillation.teacher import OutputCache
from condiquant_plugin.errors import InputError, check_finite
from condiquant_plugin.uniform.fake_quantizer import snapped_together

_BATCH = 4


class DistillationLoss:
    """Distance of a student's output, and of its features where they have a weight, to the teacher's.

    Args:
        teacher: the float network, left untouched.
        blocks: module names whose outputs are compared, present in both networks.
        criterion: of both outputs; L1 by default.
        section: what the user calls the settings, for errors.
        weights_rate: and what ``weights_rate``, where it is set elsewhere.
    """

    def __init__(
        self,
        teacher: nn.Module,
        blocks: Sequence[str],
        config: DistillationConfig,
        criterion: Callable[[Tensor, Tensor], Tensor] = l1_loss,
        section: str = "distillation",
        weights_rate: str | None = None,
    ) -> None:
        self.teacher, self.config, self.criterion = teacher, config, criterion
        self.blocks = list(blocks) if config.feature_weight else []
        self.cache = OutputCache()
        self._section, self._weights_rate = section, weights_rate or f"{section}.weights_rate"

    @torch.no_grad()
    def prepare(self, crops: Tensor) -> None:
        """Compute the teacher's outputs of crops known beforehand, ``(count, channels, height, width)``."""
        for batch in crops.split(_BATCH):
            with self._autocast(batch):
                self.cache.add(batch, self.teacher(batch))

    def __call__(
        self, student: nn.Module, inputs: Tensor, iteration: int | None = None
    ) -> dict[str, Tensor]:
        """The losses whose sum is to be minimised: ``pix``, and ``feat`` with a feature weight.

        Args:
            student: the quantized network, also wrapped by torch for several devices or processes.
            inputs: low-resolution crops, ``(batch, channels, height, width)``.
            iteration: for errors.

        Raises:
            InputError: a loss is NaN or Inf.
        """
        with self._autocast(inputs):
            target, wanted = self._teach(inputs)
            with captured(_bare(student), self.blocks) as features, _bounds_snapped_of(student):
                output = student(inputs)
        losses = {"pix": self.criterion(_full(output), _full(target))}
        if self.blocks:
            losses["feat"] = self.config.feature_weight * feature_loss(
                [_full(features[name]) for name in self.blocks],
                [_full(wanted[name]) for name in self.blocks],
            )
        total = sum(loss.detach() for loss in losses.values())
        if not torch.as_tensor(total).isfinite().all():
            self._explain(float(total), target, iteration)
        return losses

    def _autocast(self, inputs: Tensor) -> torch.autocast:
        return torch.autocast(inputs.device.type, torch.bfloat16, enabled=self.config.autocast)

    @torch.no_grad()
    def _teach(self, inputs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The teacher's output and its features."""
        keys = [] if self.cache.is_off else self.cache.keys(inputs)
        known = self.cache.find(keys) if keys else None
        if known is not None and not self.blocks:
            return known, {}
        with captured(self.teacher, self.blocks) as features:
            output = self.teacher(inputs)
        if known is not None:
            return known, features
        if keys and not self.blocks:  # with features the teacher runs anyway
            self.cache.keep(keys, output)
        return output, features

    def _explain(self, loss: float, target: Tensor, iteration: int | None) -> None:
        check_finite(target, "the output of the float network")
        config, rates = self.config, {}
        if config.bounds_rate is not None:
            rates[f"{self._section}.bounds_rate"] = config.bounds_rate
        if config.weights and config.weights_rate is not None:
            rates[self._weights_rate] = config.weights_rate
        if config.bounds_rate is None or (config.weights and config.weights_rate is None):
            rates[f"{self._section}.rate"] = config.rate
        when = "" if iteration is None else f" in iteration {iteration}"
        raise InputError(
            f"the distillation loss became {loss}{when}: lower "
            + " or ".join(f"{name} ({value})" for name, value in rates.items())
        )


def _bare(network: nn.Module) -> nn.Module:
    if isinstance(network, DataParallel | DistributedDataParallel):
        bare: nn.Module = network.module
        return bare
    return network


def _bounds_snapped_of(student: nn.Module) -> AbstractContextManager[None]:
    # Replicas on other devices have bounds of their own.
    return nullcontext() if isinstance(student, DataParallel) else snapped_together(_bare(student))


def _full(x: Tensor) -> Tensor:
    """In a precision that losses can be told apart in."""
    return x.float() if x.dtype.itemsize < torch.float32.itemsize else x
