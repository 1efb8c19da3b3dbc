"""What is wrong with a training, found before BasicSR makes its folders and anything is computed."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import torch
from basicsr.losses import LOSS_REGISTRY
from basicsr.metrics import METRIC_REGISTRY
from basicsr.models.base_model import BaseModel
from torch import nn

from condiquant_basicsr.binarized import BiDRNSR
from condiquant_basicsr.checkpoints import read_checkpoint
from condiquant_basicsr.data.training_data import one_line
from condiquant_basicsr.networks import build_network, input_channels
from condiquant_basicsr.quantizer import ENTRY
from condiquant_basicsr.sizes import check_crop_size, pad_multiple
from condiquant_basicsr.weights import load_network, resolve
from condiquant_plugin.errors import InputError

_LOGGER = ("print_freq", "save_checkpoint_freq", "use_tb_logger")
"""Keys that BasicSR does not do without."""
TEACHER, DISTILLATION = "teacher", "distillation_opt"
"""The section of a DistilledSRModel's teacher, and the key of ``train`` with the loss to its output."""
LOSS = {"type": "L1Loss"}
"""Where ``train.pixel_opt`` is left out."""


def check_start(opt: Mapping[str, Any]) -> None:
    """Check the options of a training with CondiQuantModel as far as they need no images.

    Raises:
        InputError: a checkpoint that does not fit, crops that the network does not take, or a loss,
            optimiser, scheduler or metric that BasicSR does not have.
    """
    _check_train(opt["train"])
    for key in _LOGGER:
        if key not in (opt.get("logger") or {}):
            raise InputError(f"key logger.{key} is missing: add it")
    if opt.get("val"):
        check_validation(opt["val"])
    check_crops(opt, float_network(opt))


def check_network(opt: Mapping[str, Any]) -> None:
    """Build the network of a training with one of BasicSR's own models once, on the CPU.

    Raises:
        InputError: what BasicSR would end with a traceback for; a BiDRNSR of another scale than
            ``scale``, or with buffers, which BasicSR's moving average leaves as they were at the start; a
            teacher that is missing.
    """
    section = opt.get("network_g")
    if not isinstance(section, Mapping):
        return
    network = build_network(dict(section))
    if opt.get("model_type") == "DistilledSRModel":
        teacher_network(opt)
    if not isinstance(network, BiDRNSR):
        return
    if network.upscale != opt.get("scale"):
        raise InputError(
            f"scale={opt.get('scale')}, but network_g.upscale={network.upscale}: make them the same"
        )
    decay = (opt.get("train") or {}).get("ema_decay")
    if decay and any(True for _ in network.buffers()):
        raise InputError(
            f"train.ema_decay={decay} averages no statistics, which block e2fif and tail_bits 8 have: set 0"
        )


def teacher_network(opt: Mapping[str, Any]) -> nn.Module:
    """The float network that a DistilledSRModel learns from, frozen.

    Raises:
        InputError: it is missing, cannot be read or has another scale; no loss to it.
    """
    section = opt.get(TEACHER)
    if not isinstance(section, Mapping) or not section.get("pretrain_network_g"):
        raise InputError(
            f"{TEACHER} is missing: give the float network as {TEACHER}.network_g and "
            f"{TEACHER}.pretrain_network_g"
        )
    if not (opt.get("train") or {}).get(DISTILLATION):
        raise InputError(f"train.{DISTILLATION} is missing: give a loss, as train.pixel_opt has it")
    network_g = section.get("network_g")
    network, _ = load_network(
        network_g,
        section["pretrain_network_g"],
        param_key=section.get("param_key_g"),
        scale=opt["scale"],
        channels=3 if network_g is None else input_channels(network_g),
    )
    return network.eval().requires_grad_(False)


def check_validation(validation: Mapping[str, Any]) -> None:
    """Check the section ``val`` of a training or a test.

    Raises:
        InputError: a key is missing, or a metric is none of BasicSR's.
    """
    if "save_img" not in validation:
        raise InputError("key val.save_img is missing: add it")
    for name, metric in (validation.get("metrics") or {}).items():
        kind = metric.get("type") if isinstance(metric, Mapping) else metric
        if not isinstance(metric, Mapping) or kind not in METRIC_REGISTRY:
            known = ", ".join(name for name, _ in METRIC_REGISTRY)
            raise InputError(f"val.metrics.{name} needs a type, not {kind}; there are: {known}")


def float_network(opt: Mapping[str, Any]) -> nn.Module:
    """The trained network of an option file; BasicSR puts the checkpoint of a resumed run in its place.

    Raises:
        InputError: a checkpoint that cannot be read, is quantized, or does not fit ``network_g``.
    """
    path = opt["path"]
    source = path.get("pretrain_network_teacher", path.get("pretrain_network_g"))
    if not source:
        raise InputError("path.pretrain_network_g is missing: give the float network to quantize")
    content = read_checkpoint(resolve(source))
    if ENTRY in content:
        raise InputError(
            f"{source} is quantized already: give the float network as path.pretrain_network_g, and "
            "resume with --auto_resume"
        )
    network, _ = load_network(
        opt["network_g"],
        source,
        param_key=path.get("teacher_param_key", path.get("param_key_g")),
        scale=opt.get("scale"),
        channels=input_channels(opt["network_g"]),
    )
    return network.requires_grad_(False)


def check_crops(opt: Mapping[str, Any], network: nn.Module) -> None:
    """Check that the training crops have a size that the network takes.

    Raises:
        InputError: if not; names one.
    """
    size, scale = opt["datasets"]["train"]["gt_size"], opt["scale"]
    multiple = pad_multiple(network)
    crop = size // scale
    if crop % multiple:
        raise InputError(
            f"datasets.train.gt_size={size} gives LR crops of {crop}x{crop}, but"
            f" {type(network).__name__} needs multiples of {multiple}: use gt_size"
            f" {-(-crop // multiple) * multiple * scale}"
        )
    channels = input_channels(opt["network_g"])
    check_crop_size(network, crop, channels, "datasets.train.gt_size", scale)


def _check_train(options: Mapping[str, Any]) -> None:
    """Make loss, optimiser and scheduler once, of a single parameter."""
    options = deepcopy(dict(options))
    key = "pixel_opt"
    try:
        loss = options.get(key) or dict(LOSS)
        LOSS_REGISTRY.get(loss.pop("type"))(**loss)
        key = "optim_g"
        optimizer = dict(options.get(key) or {"type": "Adam", "lr": 1e-3})
        parameters = [nn.Parameter(torch.zeros(1))]
        made = BaseModel.get_optimizer(None, optimizer.pop("type"), parameters, **optimizer)
        key = "scheduler"
        if options.get(key):
            stand_in = SimpleNamespace(opt={"train": options}, optimizers=[made], schedulers=[])
            BaseModel.setup_schedulers(stand_in)
            made = stand_in.schedulers[0]
    except (AssertionError, KeyError, NotImplementedError, TypeError, ValueError) as error:
        raise InputError(
            f"train.{key} does not suit BasicSR ({one_line(error)}): correct its type and keys"
        ) from error
    length = sum(getattr(made, "periods", ()))
    if 0 < length < int(options["total_iter"]) - 1:  # beyond them BasicSR's cosine has no rates
        raise InputError(
            f"train.scheduler.periods end after {length} iterations, but train.total_iter is"
            f" {int(options['total_iter'])}: make their sum as large"
        )
