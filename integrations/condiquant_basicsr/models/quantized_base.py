"""What BasicSR models of quantized networks share: devices, validation, checkpoints, resuming."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from basicsr.data import build_dataloader
from basicsr.losses import build_loss
from basicsr.models.base_model import BaseModel
from basicsr.models.sr_model import SRModel
from basicsr.utils import get_root_logger
from basicsr.utils.dist_util import master_only
from torch import Tensor, distributed, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.utils.data import DataLoader, Subset

from condiquant_basicsr.checkpoints import load_state_dict, read_checkpoint, save_checkpoint
from condiquant_basicsr.networks import build_network, upscale
from condiquant_basicsr.preflight import LOSS
from condiquant_basicsr.sizes import pad_multiple
from condiquant_basicsr.weights import resolve
from condiquant_plugin.errors import InputError

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


class QuantizedModel(SRModel):
    """SRModel for networks whose structure is not ``network_g``'s alone, with or without a teacher.

    As it is, it trains ``network_g`` against HR images. Models inherit it and say what quantizes
    (:meth:`with_quantizers`, or all of :meth:`make_network`), what is learned from (:meth:`make_losses`,
    ``optimize_parameters``) and what their checkpoints hold beside BasicSR's entries
    (:meth:`checkpoint_entries`). Validation is sharded over processes and takes images of any size; files
    are written whole or not at all.

    Raises:
        InputError: options, checkpoints or images that cannot be used.
    """

    multiple: int
    """What height and width of the network's inputs are multiples of; set by :meth:`make_network`."""
    trained_ema: Mapping[str, Tensor] | None = None
    """The moving average of a resumed run; set by :meth:`make_network`."""

    def __init__(self, opt: dict[str, Any]) -> None:
        BaseModel.__init__(self, opt)  # SRModel's own would build ``network_g``
        self.scale = opt.get("scale", 1)
        if opt["rank"] and opt.get("val"):
            self.opt["val"]["pbar"] = False
        network = self.make_network()
        if self.is_train:
            self.net_g = self.model_to_device(network)
            self.init_training_settings()
        else:
            self.net_g = network.to(self.device).requires_grad_(False)

    def make_network(self) -> nn.Module:
        """The network to train, or to test, on the CPU: ``network_g``, quantized, with its weights.

        The file of ``path`` holds the float network, or, resumed and tested, one that this model saved.
        """
        path, resumed = (
            self.opt["path"],
            bool(self.is_train and self.opt["path"].get("resume_state")),
        )
        network = build_network(self.opt["network_g"]).train(self.is_train)
        self.print_network(network)
        self.multiple = pad_multiple(network)
        source = path.get("pretrain_network_g")
        if not source:
            return self.with_quantizers(network)
        file, key = resolve(str(source)), "params" if resumed else path.get("param_key_g")
        state = load_state_dict(file, key)
        if resumed:
            self.trained_ema = read_checkpoint(file).get("params_ema")
        if self.is_train and not resumed:
            load_state(network, state, file)
            return self.with_quantizers(network)
        network = self.with_quantizers(network)
        load_state(network, state, file)
        return network

    def with_quantizers(self, network: nn.Module) -> nn.Module:
        """The network with what quantizes it put in, whatever its weights are; by default as it is."""
        return network

    def make_losses(self) -> None:
        """Of ``train:``, against HR images: what SRModel's ``optimize_parameters`` reads."""
        options = self.opt["train"]
        self.cri_pix = build_loss(options.get("pixel_opt") or LOSS).to(self.device)
        perceptual = options.get("perceptual_opt")
        self.cri_perceptual = build_loss(perceptual).to(self.device) if perceptual else None

    def checkpoint_entries(self) -> dict[str, Any]:
        """What a file of ``models`` holds beside BasicSR's entries."""
        return {}

    def model_to_device(self, net: nn.Module) -> nn.Module:
        """As BasicSR's, for processes without a GPU and for hooks on parameters too."""
        net = net.to(self.device)
        if self.opt["dist"]:
            devices = None if self.device.type == "cpu" else [torch.cuda.current_device()]
            unused = self.opt.get("find_unused_parameters", False)
            return DistributedDataParallel(net, devices, find_unused_parameters=unused)
        return ReplicatedParameters(net) if self.opt["num_gpu"] > 1 else net

    def init_training_settings(self) -> None:
        """EMA, losses, optimiser and scheduler of ``train:``."""
        options = self.opt["train"]
        self.ema_decay = options.get("ema_decay") or 0
        if self.ema_decay > 0:
            get_root_logger().info(f"Use Exponential Moving Average with decay: {self.ema_decay}")
            self.net_g_ema = deepcopy(self.get_bare_model(self.net_g)).requires_grad_(False)
            if self.trained_ema is not None:
                self.net_g_ema.load_state_dict(self.trained_ema)
        self.make_losses()
        self.setup_optimizers()
        self.setup_schedulers()

    def setup_schedulers(self) -> None:
        """BasicSR's, for all groups; without one the rates fall to zero along a cosine."""
        options = self.opt["train"]
        if not options.get("scheduler"):
            iterations = max(int(options["total_iter"]), 1)
            cosine = {"periods": [iterations], "restart_weights": [1]}
            options["scheduler"] = {"type": "CosineAnnealingRestartLR", **cosine}
        super().setup_schedulers()

    def test(self) -> None:
        """Upscale ``lq`` of any size, padded to what the network needs."""
        ema = hasattr(self, "net_g_ema")
        network = self.net_g_ema if ema else self.get_bare_model(self.net_g)
        if was_training := network.training:
            network.eval()
        try:
            self.output = upscale(network, self.lq, self.scale, self.multiple)
        finally:
            if was_training:
                network.train()

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
        """BasicSR's file with :meth:`checkpoint_entries`, whole or not there."""
        nets, keys = (v if isinstance(v, list) else [v] for v in (net, param_key))
        content: dict[str, Any] = {
            key: {n: t.cpu() for n, t in self.get_bare_model(each).state_dict().items()}
            for each, key in zip(nets, keys, strict=True)
        }
        content |= self.checkpoint_entries()
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


def load_state(model: nn.Module, state: Mapping[str, Tensor], file: Path) -> None:
    """Load what ``file`` holds.

    Raises:
        InputError: it is of another network.
    """
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{file} does not fit network_g: {reason[:300]}") from error
