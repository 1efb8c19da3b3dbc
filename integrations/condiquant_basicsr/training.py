"""BasicSR's ``train.py`` and ``test.py`` with CondiQuantModel, also without a GPU."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from copy import deepcopy
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

import basicsr.test as basicsr_test
import basicsr.train as basicsr_train
import torch
import yaml
from basicsr.models import build_model
from basicsr.utils import dist_util
from basicsr.utils import logger as basicsr_logger
from basicsr.utils import options as basicsr_options
from torch import distributed

from condiquant_basicsr.data.training_data import only_pictures
from condiquant_basicsr.pipeline import QUANTIZER, create_loaders, fill_in, load_resume_state
from condiquant_basicsr.preflight import check_start, check_validation
from condiquant_basicsr.quantizer import NetworkQuantizer
from condiquant_plugin.errors import InputError
from condiquant_plugin.files import check_writable
from condiquant_plugin.layerwise.distributed import noticing_the_end_of_others

_LOGGER = "basicsr"
_DATA_SERVER = "condiquant_basicsr.data_server"
_RANKS = {"pytorch": "RANK", "slurm": "SLURM_PROCID"}


def train(
    options: Mapping[str, Any],
    file: Path,
    quantizer: NetworkQuantizer | None,
    *,
    launcher: str = "none",
    auto_resume: bool = False,
    debug: bool = False,
) -> None:
    """``basicsr.train`` in the current folder.

    The first SIGINT or SIGTERM saves a checkpoint after the iteration and raises KeyboardInterrupt.

    Args:
        options: content of the option file, overrides applied.
        file: the option file itself, of which BasicSR keeps a copy.
        quantizer: for CondiQuantModel; BasicSR's own models need none.
        launcher: ``none``, ``pytorch`` (torchrun) or ``slurm``.
        auto_resume: go on from the newest state of the experiment, if there is one.
        debug: BasicSR's, which validates and saves every 8 iterations.

    Raises:
        InputError: options, checkpoints or images that cannot be used.
        DistributedError: another process of the run ended.
    """
    flags = ["--auto_resume"] * auto_resume + ["--debug"] * debug
    if quantizer is not None:
        check_start(options)
    interruption = _Interruption()
    parts = {
        "load_resume_state": load_resume_state,
        "create_train_val_dataloader": interruption.create_loaders,
        "build_model": interruption.build_model,
    }
    with (
        _host(options, file, quantizer, launcher, flags, basicsr_train),
        _replaced(basicsr_train, **parts),
        closing(interruption),
    ):
        basicsr_train.train_pipeline(os.getcwd())


def evaluate(
    options: Mapping[str, Any],
    file: Path,
    quantizer: NetworkQuantizer | None,
    *,
    launcher: str = "none",
    debug: bool = False,
) -> None:
    """``basicsr.test`` in the current folder; arguments and errors are those of :func:`train`."""
    if quantizer is not None:
        check_validation(options["val"])
    with _host(options, file, quantizer, launcher, ["--debug"] * debug, basicsr_test):
        basicsr_test.test_pipeline(os.getcwd())


@contextmanager
def _host(
    options: Mapping[str, Any],
    file: Path,
    quantizer: NetworkQuantizer | None,
    launcher: str,
    flags: Sequence[str],
    pipeline: Any,
) -> Iterator[None]:
    """BasicSR with our options, model and processes, for one run."""

    def parse(root_path: str, is_train: bool) -> tuple[dict[str, Any], Any]:
        opt, parsed = _parse(options, file, [*flags, "--launcher", launcher], root_path, is_train)
        if quantizer is not None:
            opt[QUANTIZER] = quantizer
        return opt, parsed

    for folder in ("experiments", "tb_logger") if pipeline is basicsr_train else ("results",):
        check_writable(Path.cwd() / folder)
    _close_log()
    try:
        with (
            _replaced(pipeline, parse_options=parse),
            only_pictures(),
            noticing_the_end_of_others("training") if launcher != "none" else nullcontext(),
        ):
            yield
        if distributed.is_initialized():
            distributed.destroy_process_group()
    finally:
        _close_log()


def _parse(
    options: Mapping[str, Any], file: Path, flags: Sequence[str], root_path: str, is_train: bool
) -> tuple[dict[str, Any], Any]:
    """BasicSR's own parser, on the options as they were read safely."""
    content = {"num_gpu": "auto"} | deepcopy(dict(options))

    def init_dist(launcher: str, backend: str = "nccl", **arguments: Any) -> None:
        _init_dist(
            launcher, (options.get("dist_params") or {}).get("backend", backend), **arguments
        )

    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / file.name
        copy.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
        arguments = [sys.argv[0], "-opt", str(copy), *flags]
        with _replaced(sys, argv=arguments), _replaced(basicsr_options, init_dist=init_dist):
            opt, parsed = basicsr_options.parse_options(root_path, is_train=is_train)
    parsed.opt = str(file)
    fill_in(opt)
    return opt, parsed


def _init_dist(launcher: str, backend: str, **arguments: Any) -> None:
    """BasicSR's, which counts on a GPU."""
    if (variable := _RANKS[launcher]) not in os.environ:
        raise InputError(
            f"--launcher {launcher} finds no {variable}: start with "
            + (
                "srun"
                if launcher == "slurm"
                else "torchrun --nproc_per_node=2 -m condiquant_recipes"
            )
        )
    # BasicSR's choice, spawn, has each worker import everything anew in every epoch, and unhealed.
    if "forkserver" in multiprocessing.get_all_start_methods():
        multiprocessing.set_forkserver_preload([_DATA_SERVER])
        multiprocessing.set_start_method("forkserver", force=True)
    if torch.cuda.is_available():
        dist_util.init_dist(launcher, backend, **arguments)
        return
    with _replaced(torch.cuda, device_count=lambda: 1, set_device=lambda _: None):
        dist_util.init_dist(launcher, "gloo", **arguments)


class _Interruption:
    """Turns the first signal into a checkpoint of whole iterations, once training has begun."""

    def __init__(self) -> None:
        self.signalled = False
        self.sampler: Any = None
        self.before: dict[int, Any] = {}

    def close(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def create_loaders(self, opt: dict[str, Any], logger: logging.Logger) -> tuple[Any, ...]:
        loaders = create_loaders(opt, logger)
        train_loader, self.sampler = loaders[:2]
        train_loader.worker_init_fn = partial(_start_worker, train_loader.worker_init_fn)
        return loaders

    def build_model(self, opt: dict[str, Any]) -> Any:
        model = build_model(opt)
        step: Callable[[int], None] = model.optimize_parameters

        def optimize_parameters(current_iter: int) -> None:
            step(current_iter)
            if self.signalled:
                model.save(self.sampler.epoch, current_iter)
                raise KeyboardInterrupt

        if opt["rank"] == 0:
            model.optimize_parameters = optimize_parameters
            self._handle(signal.SIGINT, self._signal)
            self._handle(signal.SIGTERM, self._signal)
        else:  # the first process saves, for which it needs the others to finish their iteration
            self._handle(signal.SIGINT, signal.SIG_IGN)
            self._handle(signal.SIGTERM, signal.SIG_IGN)
        return model

    def _handle(self, number: int, handler: Any) -> None:
        self.before[number] = signal.signal(number, handler)

    def _signal(self, *_: object) -> None:
        if self.signalled and not distributed.is_initialized():  # launchers signal twice
            raise KeyboardInterrupt
        self.signalled = True
        print("saving after this iteration, then stopping", file=sys.stderr, flush=True)


def _start_worker(start: Callable[[int], None] | None, number: int) -> None:
    """A signal to the whole job must leave workers to the process that saves."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    Thread(target=_end_with_parent, daemon=True).start()
    if start is not None:
        start(number)


def _end_with_parent() -> None:
    """If a process is killed its fork server waits for the workers, and PyTorch has them wait for it."""
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)


@contextmanager
def _replaced(owner: Any, **values: Any) -> Iterator[None]:
    """Other attributes of a module or class for a while."""
    before = {name: getattr(owner, name) for name in values}
    for name, value in values.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


def _close_log() -> None:
    """BasicSR keeps the log file of the first run for all further ones of a process."""
    logger = logging.getLogger(_LOGGER)
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    basicsr_logger.initialized_logger.pop(_LOGGER, None)
