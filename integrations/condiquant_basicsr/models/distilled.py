"""BasicSR's ``model_type: DistilledSRModel``: a network learns from images and from a float network."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from basicsr.losses import build_loss
from basicsr.models.sr_model import SRModel
from basicsr.utils.registry import MODEL_REGISTRY
from torch import Tensor, nn

from condiquant_basicsr.preflight import DISTILLATION, teacher_network


@MODEL_REGISTRY.register()
class DistilledSRModel(SRModel):
    """SRModel with a teacher; its checkpoints, schedule and resuming are SRModel's.

    Beside the options of SRModel: ``teacher`` with ``network_g`` and ``pretrain_network_g``, and
    optionally ``param_key_g``; ``train.distillation_opt``, a loss of BasicSR's between the outputs of both
    networks, which is added to ``train.pixel_opt``.

    Raises:
        InputError: a teacher that is missing, cannot be read or has another scale; no such loss.
    """

    cri_pix: Any

    def init_training_settings(self) -> None:
        """SRModel's, and the teacher."""
        self.teacher = teacher_network(self.opt).to(self.device)
        super().init_training_settings()
        distillation = build_loss(dict(self.opt["train"][DISTILLATION])).to(self.device)
        self.cri_pix = _BesidePixels(self.cri_pix, distillation)

    def optimize_parameters(self, current_iter: int) -> None:
        """One step towards the images and the teacher's output."""
        with torch.no_grad():
            self.cri_pix.target = self.teacher(self.lq)
        super().optimize_parameters(current_iter)
        apart = OrderedDict((name, loss.detach()) for name, loss in self.cri_pix.parts.items())
        self.log_dict |= self.reduce_loss_dict(apart)


class _BesidePixels(nn.Module):
    """The sum of a loss to the images, if there is one, and one to ``target``."""

    def __init__(self, pixels: nn.Module | None, distillation: nn.Module) -> None:
        super().__init__()
        self.pixels, self.distillation = pixels, distillation
        self.target = torch.empty(0)
        self.parts: dict[str, Tensor] = {}

    def forward(self, output: Tensor, images: Tensor) -> Tensor:
        self.parts = {"l_distillation": self.distillation(output, self.target)}
        if self.pixels is not None:
            self.parts["l_images"] = self.pixels(output, images)
        return torch.stack(list(self.parts.values())).sum()
