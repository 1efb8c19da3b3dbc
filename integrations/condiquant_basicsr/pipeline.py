"""What BasicSR's ``train_pipeline`` and ``test_pipeline`` need for CondiQuantModel, put in at import.

Other models train as ever; they can resume without a GPU, too, and are tested on pictures alone.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import wraps
from pathlib import Path
from typing import Any

import basicsr.test as basicsr_test
import basicsr.train as basicsr_train
import torch
from basicsr.utils import check_resume

from condiquant_basicsr.checkpoints import read_checkpoint
from condiquant_basicsr.data.training_data import one_line, only_pictures, same_chance
from condiquant_basicsr.preflight import check_start, check_validation
from condiquant_basicsr.quantizer import MODEL_TYPE, find_quantizer
from condiquant_plugin.errors import InputError

QUANTIZER = "condiquant_quantizer"
"""Key of prepared options: what :func:`find_quantizer` made of them."""
_STATE = {"epoch", "iter", "optimizers", "schedulers"}
_parse_training, _parse_test = basicsr_train.parse_options, basicsr_test.parse_options
_load_resume_state = basicsr_train.load_resume_state
_create_loaders = basicsr_train.create_train_val_dataloader
_build_test_set = basicsr_test.build_dataset


def fill_in(opt: dict[str, Any]) -> None:
    """Defaults of options that BasicSR has parsed; without a GPU, what goes without one."""
    if not torch.cuda.is_available():
        opt["num_gpu"] = 0
        for dataset in opt["datasets"].values():
            if dataset.get("prefetch_mode") == "cuda":
                dataset["prefetch_mode"] = None
    path = opt["path"]
    # Resuming puts the quantized checkpoint in their place; BasicSR makes folders of keys it does not know.
    if path.get("pretrain_network_teacher") is None:
        path["pretrain_network_teacher"] = path.get("pretrain_network_g")
        path["teacher_param_key"] = path.get("param_key_g")
    if not opt["is_train"]:
        opt["datasets"].pop("train", None)
        if opt.get("val"):
            opt["val"].setdefault("suffix", None)


def prepare(opt: dict[str, Any]) -> None:
    """Check options of CondiQuantModel, and fill in defaults and the quantizer.

    Raises:
        InputError: as `condiquant train` and `condiquant test`; nothing installed offers a quantizer.
    """
    path = opt["path"]
    if path.get("resume_state") and not path.get("pretrain_network_teacher") and "models" in path:
        source = Path(path.get("pretrain_network_g") or "")
        if source.is_relative_to(path["models"]):  # put there by check_resume
            raise InputError(
                "path.pretrain_network_teacher is missing: resuming needs the float network, whose"
                f" place in path.pretrain_network_g {source} has taken"
            )
    fill_in(opt)
    asked = _plain(opt)
    if opt["is_train"]:
        asked["path"] |= {
            "pretrain_network_g": path["pretrain_network_teacher"],
            "param_key_g": path.get("teacher_param_key"),
        }
    with same_chance():  # BasicSR has set its seeds
        quantizer = find_quantizer(asked)
        if opt["is_train"]:
            check_start(opt)
        else:
            check_validation(opt["val"])
    opt[QUANTIZER] = quantizer


def load_resume_state(opt: dict[str, Any]) -> dict[str, Any] | None:
    """BasicSR's, without a GPU and without unpickling what others wrote.

    Raises:
        InputError: no training state, or a network that BasicSR would move away.
    """
    path = opt["path"].get("resume_state")
    if opt["auto_resume"]:
        folder = Path(opt["path"]["training_states"])
        states = [state for state in folder.glob("*.state") if state.stem.isdigit()]
        path = max(states, key=lambda state: int(state.stem), default=None)
    if path is None:
        opt["path"]["resume_state"] = None
        source = Path(opt["path"].get("pretrain_network_g") or "")
        experiment = Path(opt["path"]["experiments_root"])
        ours = opt["model_type"] == MODEL_TYPE
        if ours and source.resolve().is_relative_to(experiment.resolve()):
            raise InputError(
                f"path.pretrain_network_g={source} is in the folder of the experiment {opt['name']}, which "
                "BasicSR renames to start anew: change name, or resume with --auto_resume"
            )
        return None
    state = dict(read_checkpoint(Path(path)))
    if not state.keys() >= _STATE:
        raise InputError(
            f"path.resume_state={path} is no training state: give a .state file of training_states in"
            " the folder of its experiment"
        )
    opt["path"]["resume_state"] = str(path)
    check_resume(opt, state["iter"])
    if opt["model_type"] != MODEL_TYPE:
        return state
    network = Path(opt["path"]["pretrain_network_g"])
    if not network.is_file():
        raise InputError(
            f"{path} needs the network saved with it, but there is no {network}: "
            "resume with the name of its experiment"
        )
    return state


def create_loaders(opt: dict[str, Any], logger: logging.Logger) -> tuple[Any, ...]:
    """BasicSR's, of pictures alone.

    Raises:
        InputError: data that BasicSR cannot use, or less than a batch.
    """
    try:
        with only_pictures():
            loaders: tuple[Any, ...] = _create_loaders(opt, logger)
    except (AssertionError, KeyError, OSError, ValueError) as error:
        raise InputError(
            f"cannot use the data ({type(error).__name__}: {one_line(error)}):"
            " correct the datasets section"
        ) from error
    if not len(loaders[0]):  # BasicSR would train on nothing, without a word
        raise InputError(
            "datasets.train has fewer images than a batch: lower batch_size_per_gpu, or raise"
            " dataset_enlarge_ratio"
        )
    return loaders


def _plain(value: Any) -> Any:
    """Plain dicts in the place of BasicSR's ordered ones."""
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, list) else value


def _concerns_us(opt: Mapping[str, Any]) -> bool:
    return opt.get("model_type") == MODEL_TYPE or "condiquant" in opt


def _preparing(parse: Any) -> Any:
    @wraps(parse)
    def parse_options(root_path: str, is_train: bool = True) -> tuple[dict[str, Any], Any]:
        opt, arguments = parse(root_path, is_train=is_train)
        if _concerns_us(opt):
            prepare(opt)
        return opt, arguments

    return parse_options


@wraps(_load_resume_state)
def _resuming(opt: dict[str, Any]) -> Any:
    healed = _concerns_us(opt) or not torch.cuda.is_available()  # BasicSR's loads to a GPU
    return (load_resume_state if healed else _load_resume_state)(opt)


@wraps(_create_loaders)
def _loading(opt: dict[str, Any], logger: logging.Logger) -> tuple[Any, ...]:
    loaders: tuple[Any, ...] = (create_loaders if _concerns_us(opt) else _create_loaders)(
        opt, logger
    )
    return loaders


@wraps(_build_test_set)
def _building(dataset_opt: dict[str, Any]) -> Any:
    with only_pictures():
        return _build_test_set(dataset_opt)


basicsr_train.parse_options = _preparing(_parse_training)
basicsr_test.parse_options = _preparing(_parse_test)
basicsr_train.load_resume_state = _resuming
basicsr_train.create_train_val_dataloader = _loading
basicsr_test.build_dataset = _building
