"""BasicSR's ``model_type: CondiQuantModel``: quantizes a trained network, then distils it."""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, ClassVar

import torch
from basicsr.data import build_dataloader
from basicsr.losses import build_loss
from basicsr.models.base_model import BaseModel
from basicsr.models.sr_model import SRModel
from basicsr.utils import get_root_logger
from basicsr.utils.dist_util import master_only
from basicsr.utils.registry import MODEL_REGISTRY
from torch import Tensor, distributed, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.utils.data import DataLoader, Subset

from condiquant_basicsr.checkpoints import entry_named, save_checkpoint
from condiquant_basicsr.data.training_data import training_crops
from condiquant_basicsr.networks import build_network, folded, pad_multiple, upscale
from condiquant_basicsr.preflight import LOSS, float_network
from condiquant_basicsr.quantizer import ENTRY, QuantizedNetwork, Quantizer, read_quantized
from condiquant_plugin.distillation import captured, feature_loss, parameter_groups
from condiquant_plugin.errors import InputError
from condiquant_plugin.layerwise.distributed import failing_together

_PLACE = ("last_epoch", "_step_count", "_last_lr", "base_lrs")
"""What a scheduler's state says beside the schedule, with which a longer training could not go on."""


class ReplicatedParameters(DataParallel):
    """DataParallel whose replicas have parameters: without them NNCF leaves out the weights' quantizers."""

    def replicate(self, module: nn.Module, device_ids: Any) -> list[nn.Module]:
        """One replica for each device."""
        replicas: list[nn.Module] = super().replicate(module, device_ids)
        for part in (part for replica in replicas for part in replica.modules()):
            for name, tensor in part._former_parameters.items():  # type: ignore[union-attr, operator]
                tensor._is_param = True
                part._parameters[name] = tensor
        return replicas


@MODEL_REGISTRY.register()
class CondiQuantModel(SRModel):
    """Quantizes ``path.pretrain_network_g`` and trains it to follow the float network.

    ``net_g`` is the quantized network. Checkpoints hold, beside BasicSR's entries, ``condiquant``: the
    settings that rebuild its structure. Validation is sharded over processes.

    Raises:
        InputError: options, checkpoints or images that cannot be used.
    """

    quantizer: ClassVar[Quantizer | None] = None
    """Set by :mod:`condiquant_basicsr.training` for the time of a run."""

    def __init__(self, opt: dict[str, Any]) -> None:
        BaseModel.__init__(self, opt)  # SRModel's own would train the float network
        if self.quantizer is None:
            raise InputError(
                "CondiQuantModel runs in `condiquant train` and `condiquant test`, not in BasicSR's own"
            )
        self.scale = opt.get("scale", 1)
        if opt["rank"] and opt.get("val"):
            self.opt["val"]["pbar"] = False
        if self.is_train:
            self._start_training(self.quantizer)
        else:
            self._load_for_test(self.quantizer)
        if self.is_train:
            self.init_training_settings()

    def _start_training(self, quantizer: Quantizer) -> None:
        path = self.opt["path"]
        self.teacher = float_network(self.opt)
        self.teacher_digest = _digest(self.teacher)
        self.print_network(self.teacher)
        self.multiple = pad_multiple(self.teacher)
        self.trained_ema: Mapping[str, Tensor] | None = None
        if path.get("resume_state"):
            file = Path(path["pretrain_network_g"])
            quantized, content = self._rebuild(quantizer, self.teacher, file)
            if content[ENTRY].get("float_sha256", self.teacher_digest) != self.teacher_digest:
                raise InputError(
                    f"{file} follows another float network than {path['pretrain_network_teacher']}: give "
                    "that as path.pretrain_network_g, or train anew"
                )
            _load_state(quantized.model, content["params"], file)
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
        self.net_g = self.model_to_device(quantized.model)

    def _load_for_test(self, quantizer: Quantizer) -> None:
        path = self.opt["path"]
        file = Path(path["pretrain_network_g"])
        network = folded(build_network(self.opt["network_g"]))
        self.print_network(network)
        self.multiple = pad_multiple(network)
        quantized, content = self._rebuild(quantizer, network, file)
        key = entry_named(path.get("param_key_g") or "params_ema", content, file)
        get_root_logger().info(f"Loading {key} of {file}")
        _load_state(quantized.model, content[key], file)
        self.net_g = quantized.model.to(self.device).requires_grad_(False)

    def _calibration_crops(self, count: int) -> Tensor:
        opt = self.opt["datasets"]["train"]
        with failing_together("reading calibration images"):
            crops = training_crops(opt, self.scale, count, self.opt["manual_seed"]).to(self.device)
        if self.opt["dist"]:  # without manual_seed every process draws its own
            distributed.broadcast(crops, 0)
        return crops

    def _rebuild(
        self, quantizer: Quantizer, network: nn.Module, file: Path
    ) -> tuple[QuantizedNetwork, Mapping[str, Any]]:
        """The structure that a checkpoint of an earlier run has, and the checkpoint."""
        content = read_quantized(file)
        record = content[ENTRY]
        quantizer.check(record, str(file))
        self.example_shape = record["example_shape"]
        return quantizer.rebuild(network, torch.zeros(1, *self.example_shape)), content

    def model_to_device(self, net: nn.Module) -> nn.Module:
        """As BasicSR's, for processes without a GPU and for hooks on parameters too."""
        net = net.to(self.device)
        if self.opt["dist"]:
            devices = None if self.device.type == "cpu" else [torch.cuda.current_device()]
            unused = self.opt.get("find_unused_parameters", False)
            return DistributedDataParallel(net, devices, find_unused_parameters=unused)
        return ReplicatedParameters(net) if self.opt["num_gpu"] > 1 else net

    def init_training_settings(self) -> None:
        """EMA, loss, optimiser and scheduler of ``train:``; losses against HR images are left out."""
        options, logger = self.opt["train"], get_root_logger()
        self.ema_decay = options.get("ema_decay") or 0
        if self.ema_decay > 0:
            logger.info(f"Use Exponential Moving Average with decay: {self.ema_decay}")
            self.net_g_ema = deepcopy(self.get_bare_model(self.net_g)).requires_grad_(False)
            if self.trained_ema is not None:
                self.net_g_ema.load_state_dict(self.trained_ema)
        self.cri_pix = build_loss(options.get("pixel_opt") or LOSS).to(self.device)
        self.setup_optimizers()
        self.setup_schedulers()

    def setup_optimizers(self) -> None:
        """One group per fake quantizer, whose rate follows its range, and one of the weights."""
        assert self.quantizer is not None
        config = self.quantizer.distillation
        adam = {"type": "Adam", "lr": config.weights_rate, "betas": (0.9, 0.99)}
        options = dict(self.opt["train"].get("optim_g") or adam)
        network = self.get_bare_model(self.net_g)
        groups = parameter_groups(network, config, self.trainable_weights)
        self.optimizer_g = self.get_optimizer(options.pop("type"), groups, **options)
        self.optimizers.append(self.optimizer_g)

    def setup_schedulers(self) -> None:
        """BasicSR's, for all groups; without one the rates fall to zero along a cosine."""
        options = self.opt["train"]
        if not options.get("scheduler"):
            iterations = max(int(options["total_iter"]), 1)
            cosine = {"periods": [iterations], "restart_weights": [1]}
            options["scheduler"] = {"type": "CosineAnnealingRestartLR", **cosine}
        super().setup_schedulers()

    def get_current_learning_rate(self) -> list[float]:
        """Of the last group, the weights': the others keep their ratio to it."""
        return [self.optimizer_g.param_groups[-1]["lr"]]

    def optimize_parameters(self, current_iter: int) -> None:
        """One step towards the float network's output, and its features where they have a weight.

        Raises:
            InputError: the loss became NaN or Inf.
        """
        assert self.quantizer is not None
        config, student = self.quantizer.distillation, self.get_bare_model(self.net_g)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.quantizer.autocast):
            with torch.no_grad(), captured(self.teacher, self.blocks) as wanted:
                target = self.teacher(self.lq)
            with captured(student, self.blocks) as features:
                self.output = self.net_g(self.lq)
        losses = OrderedDict(l_pix=self.cri_pix(self.output.float(), target.float()))
        if self.blocks:
            losses["l_feat"] = config.feature_weight * feature_loss(
                [features[name].float() for name in self.blocks],
                [wanted[name].float() for name in self.blocks],
            )
        total = torch.stack(list(losses.values())).sum()
        if not total.isfinite():
            raise InputError(
                f"the loss became {total.item()} in iteration {current_iter}: lower train.optim_g.lr "
                f"({config.weights_rate}) or condiquant.distillation.bounds_rate ({config.bounds_rate})"
            )
        self.optimizer_g.zero_grad()
        total.backward()
        self.optimizer_g.step()
        self.log_dict = self.reduce_loss_dict(losses)
        if self.ema_decay > 0:
            self.model_ema(decay=self.ema_decay)

    def test(self) -> None:
        """Upscale ``lq`` of any size, padded to what the network needs."""
        ema = hasattr(self, "net_g_ema")
        network = self.net_g_ema if ema else self.get_bare_model(self.net_g)
        self.output = upscale(network, self.lq, self.scale, self.multiple)

    def dist_validation(
        self, dataloader: DataLoader, current_iter: int | str, tb_logger: Any, save_img: bool
    ) -> None:
        """Every process takes its share of the images; metrics are those of all."""
        dataset: Any = dataloader.dataset
        # Each process has listed the folder itself, in whatever order.
        order = sorted(range(len(dataset)), key=lambda i: str(dataset.paths[i]))
        own = order[self.opt["rank"] :: self.opt["world_size"]]
        share: Any = Subset(dataset, own or order[:1])  # BasicSR cannot validate on nothing
        share.opt = dataset.opt
        self.own_images = len(own)
        try:
            self.nondist_validation(
                build_dataloader(share, dataset.opt), current_iter, tb_logger, save_img and own
            )
        finally:
            del self.own_images

    def _update_best_metric_result(
        self, dataset_name: str, metric: str, val: float, current_iter: int
    ) -> None:
        if hasattr(self, "own_images"):
            own = [val * self.own_images if self.own_images else 0.0, self.own_images]
            total = torch.tensor(own, dtype=torch.float64, device=self.device)
            distributed.all_reduce(total)
            val = self.metric_results[metric] = float(total[0] / total[1])
        super()._update_best_metric_result(dataset_name, metric, val, current_iter)

    @master_only
    def save_network(
        self, net: Any, net_label: str, current_iter: int, param_key: Any = "params"
    ) -> None:
        """BasicSR's file with an entry ``condiquant``, whole or not there."""
        assert self.quantizer is not None
        nets, keys = (v if isinstance(v, list) else [v] for v in (net, param_key))
        content: dict[str, Any] = {
            key: {n: t.cpu() for n, t in self.get_bare_model(each).state_dict().items()}
            for each, key in zip(nets, keys, strict=True)
        }
        content[ENTRY] = {
            "example_shape": self.example_shape,
            "float_sha256": self.teacher_digest,
            **self.quantizer.record(),
        }
        name = "latest" if current_iter == -1 else current_iter
        save_checkpoint(content, Path(self.opt["path"]["models"]) / f"{net_label}_{name}.pth")

    @master_only
    def save_training_state(self, epoch: int, current_iter: int) -> None:
        """BasicSR's file, whole or not there."""
        if current_iter == -1:
            return
        state = {
            "epoch": epoch,
            "iter": current_iter,
            "optimizers": [o.state_dict() for o in self.optimizers],
            "schedulers": [s.state_dict() for s in self.schedulers],
        }
        save_checkpoint(state, Path(self.opt["path"]["training_states"]) / f"{current_iter}.state")

    def resume_training(self, resume_state: dict[str, Any]) -> None:
        """Optimiser of an earlier run and the place in its schedule, which itself is the options'.

        Raises:
            InputError: of another network, or other training options.
        """
        places = [
            {key: value for key, value in state.items() if key in _PLACE}
            for state in resume_state["schedulers"]
        ]
        try:
            super().resume_training(resume_state | {"schedulers": places})
        except (AssertionError, KeyError, ValueError) as error:
            raise InputError(
                f"{self.opt['path']['resume_state']} does not fit this network and its train section "
                f"({' '.join(str(error).split())}): resume with the options it was made with"
            ) from error


def _digest(network: nn.Module) -> str:
    """sha256 of all weights."""
    digest = hashlib.sha256()
    for tensor in network.state_dict().values():
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()


def _load_state(model: nn.Module, state: Mapping[str, Tensor], file: Path) -> None:
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{file} does not fit network_g: {reason[:300]}") from error
