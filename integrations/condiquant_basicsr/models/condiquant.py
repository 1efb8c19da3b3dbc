"""BasicSR's ``model_type: CondiQuantModel``: quantizes a trained network, then distils it."""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from basicsr.losses import build_loss
from basicsr.utils import get_root_logger
from basicsr.utils.registry import MODEL_REGISTRY
from torch import Tensor, distributed, nn

from condiquant_basicsr.checkpoints import entry_named
from condiquant_basicsr.data.training_data import training_crops
from condiquant_basicsr.models.quantized_base import QuantizedModel, load_state
from condiquant_basicsr.networks import build_network, folded
from condiquant_basicsr.pipeline import QUANTIZER, prepare
from condiquant_basicsr.preflight import LOSS, float_network
from condiquant_basicsr.quantizer import ENTRY, NetworkQuantizer, TrainableNetwork, read_quantized
from condiquant_basicsr.sizes import pad_multiple
from condiquant_plugin.distillation import DistillationLoss, parameter_groups
from condiquant_plugin.errors import InputError
from condiquant_plugin.layerwise.distributed import failing_together


@MODEL_REGISTRY.register()
class CondiQuantModel(QuantizedModel):
    """Quantizes ``path.pretrain_network_g`` and trains it to follow the float network.

    ``net_g`` is the quantized network. Checkpoints hold, beside BasicSR's entries, ``condiquant``: the
    settings that rebuild its structure. Validation is sharded over processes.

    Raises:
        InputError: options, checkpoints or images that cannot be used.
    """

    def __init__(self, opt: dict[str, Any]) -> None:
        if QUANTIZER not in opt:  # a pipeline that is not BasicSR's
            prepare(opt)
        self.quantizer: NetworkQuantizer = opt.pop(QUANTIZER)
        super().__init__(opt)

    def make_network(self) -> nn.Module:
        """The quantized network: calibrated now, or rebuilt as a checkpoint says."""
        return self._start_training() if self.is_train else self._load_for_test()

    def _start_training(self) -> nn.Module:
        path, quantizer = self.opt["path"], self.quantizer
        self.teacher = float_network(self.opt)
        self.teacher_digest = _digest(self.teacher)
        self.print_network(self.teacher)
        self.multiple = pad_multiple(self.teacher)
        if path.get("resume_state"):
            file = Path(path["pretrain_network_g"])
            quantized, content = self._rebuild(self.teacher, file)
            if content[ENTRY].get("float_sha256", self.teacher_digest) != self.teacher_digest:
                raise InputError(
                    f"{file} follows another float network than {path['pretrain_network_teacher']}: give "
                    "that as path.pretrain_network_g, or train anew"
                )
            load_state(quantized.model, content["params"], file)
            self.trained_ema = content.get("params_ema")
        else:
            crops = self._calibration_crops(quantizer.calibration_images)
            self.example_shape = list(crops.shape[1:])
            started = time.perf_counter()
            quantized = quantizer.quantize(self.teacher.to(self.device), crops)
            seconds = time.perf_counter() - started
            get_root_logger().info(f"Quantized in {seconds:.1f} s: {quantized.summary}")
        self.teacher.to(self.device)
        self.blocks = quantized.blocks if quantizer.distillation.feature_weight else []
        if self.blocks and not self.opt["dist"] and self.opt["num_gpu"] > 1:
            raise InputError(
                "condiquant.distillation.feature_weight works on one GPU or with --launcher pytorch: "
                "use either, or set it to 0"
            )
        self.trainable_weights = quantized.trainable_weights
        groups = parameter_groups(
            quantized.model, quantizer.distillation, quantized.trainable_weights
        )
        trained = {id(p) for group in groups for p in group["params"]}
        for parameter in quantized.model.parameters():
            parameter.requires_grad_(id(parameter) in trained)
        return quantized.model

    def _load_for_test(self) -> nn.Module:
        path = self.opt["path"]
        file = Path(path["pretrain_network_g"])
        network = folded(build_network(self.opt["network_g"]))
        self.print_network(network)
        self.multiple = pad_multiple(network)
        quantized, content = self._rebuild(network, file)
        key = entry_named(path.get("param_key_g") or "params_ema", content, file)
        get_root_logger().info(f"Loading {key} of {file}")
        load_state(quantized.model, content[key], file)
        return quantized.model

    def _calibration_crops(self, count: int) -> Tensor:
        opt = self.opt["datasets"]["train"]
        with failing_together("reading calibration images"):
            crops = training_crops(opt, self.scale, count, self.opt["manual_seed"]).to(self.device)
        if self.opt["dist"]:  # without manual_seed every process draws its own
            distributed.broadcast(crops, 0)
        return crops

    def _rebuild(
        self, network: nn.Module, file: Path
    ) -> tuple[TrainableNetwork, Mapping[str, Any]]:
        """The structure that a checkpoint of an earlier run has, and the checkpoint."""
        content = read_quantized(file)
        record = content[ENTRY]
        self.quantizer.check(record, str(file))
        self.example_shape = record["example_shape"]
        return self.quantizer.rebuild(network, torch.zeros(1, *self.example_shape)), content

    def make_losses(self) -> None:
        """The distance to the float network; losses against HR images are left out."""
        pixel = build_loss(self.opt["train"].get("pixel_opt") or LOSS).to(self.device)
        self.loss = DistillationLoss(
            self.teacher,
            self.blocks,
            self.quantizer.distillation,
            pixel,
            section="condiquant.distillation",
            weights_rate="train.optim_g.lr",
        )

    def checkpoint_entries(self) -> dict[str, Any]:
        """The settings that rebuild the quantized structure, and which network it follows."""
        return {
            ENTRY: {
                "example_shape": self.example_shape,
                "float_sha256": self.teacher_digest,
                **self.quantizer.record(),
            }
        }

    def setup_optimizers(self) -> None:
        """One group per fake quantizer, with a rate of its own, and one of the weights."""
        network = self.get_bare_model(self.net_g)
        groups = parameter_groups(network, self.quantizer.distillation, self.trainable_weights)
        adam = {"type": "Adam", "lr": groups[-1]["lr"], "betas": (0.9, 0.99)}
        options = dict(self.opt["train"].get("optim_g") or adam)
        self.optimizer_g = self.get_optimizer(options.pop("type"), groups, **options)
        self.optimizers.append(self.optimizer_g)

    def get_current_learning_rate(self) -> list[float]:
        """Of the last group, the weights': the others keep their ratio to it."""
        return [self.optimizer_g.param_groups[-1]["lr"]]

    def optimize_parameters(self, current_iter: int) -> None:
        """One step towards the float network's output, and its features where they have a weight.

        Raises:
            InputError: the loss became NaN or Inf.
        """
        losses = self.loss(self.net_g, self.lq, current_iter)
        total = torch.stack(list(losses.values())).sum()
        self.optimizer_g.zero_grad()
        total.backward()
        self.optimizer_g.step()
        self.log_dict = self.reduce_loss_dict(
            OrderedDict((f"l_{name}", loss) for name, loss in losses.items())
        )
        if self.ema_decay > 0:
            self.model_ema(decay=self.ema_decay)


def _digest(network: nn.Module) -> str:
    """sha256 of all weights."""
    digest = hashlib.sha256()
    for tensor in network.state_dict().values():
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()
