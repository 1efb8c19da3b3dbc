"""The training loop of crops in memory, for hosts that have none of their own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from condiquant_plugin.distillation.augmentation import augmented
from condiquant_plugin.distillation.loss import DistillationLoss
from condiquant_plugin.distillation.rates import parameter_groups
from condiquant_plugin.distillation.settings import DistillationConfig
from condiquant_plugin.errors import InputError
from condiquant_plugin.files import replacing
from condiquant_plugin.uniform.fake_quantizer import fake_quantizers

_SLOWER_BOUNDS, _SLOWER_WEIGHTS = 10.0, 3.0
"""Rates that only do harm at the first validations are divided by them."""
_HARM = 1.1
"""So many times the first loss: what is less, falling rates mend."""


@dataclass(frozen=True)
class DistillationResult:
    """What a distillation did; losses are mean absolute differences to the float output."""

    initial_loss: float
    best_loss: float
    best_iteration: int
    iterations: int
    restarts: int = 0
    """How often it began again at lower rates before anything got better."""


def distill(
    student: nn.Module,
    teacher: nn.Module,
    crops: Tensor,
    held_out: Tensor,
    config: DistillationConfig,
    *,
    trainable_weights: Sequence[nn.Parameter] = (),
    blocks: Sequence[str] = (),
    checkpoint: Path | None = None,
    progress: Callable[[int, float], object] | None = None,
    seed: int = 0,
) -> DistillationResult:
    """Train ``student`` in place; it ends with the parameters that did best on ``held_out``.

    Until a validation is better than the start, each one that is much worse begins again at lower rates.

    Args:
        student: network with fake quantizers.
        teacher: the float network, left untouched.
        crops: low-resolution inputs, shape ``(count, channels, height, width)``.
        held_out: inputs of the same shape on which the checkpoint is chosen.
        trainable_weights: weights and biases of the quantized layers.
        blocks: module names whose outputs are compared, present in both networks.
        checkpoint: state is saved here at every validation; an existing one is resumed.
        progress: called with the iteration and its loss.
        seed: of the order of the crops.

    Raises:
        InputError: if the loss becomes NaN or Inf, or ``checkpoint`` belongs to other settings.
    """
    run = _Run(
        student, teacher, crops, held_out, config, trainable_weights, blocks, checkpoint, seed
    )
    with run.only_trained_parameters_need_gradients():
        return run.train(progress or (lambda _, __: None))


class _Run:
    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        crops: Tensor,
        held_out: Tensor,
        config: DistillationConfig,
        trainable_weights: Sequence[nn.Parameter],
        blocks: Sequence[str],
        checkpoint: Path | None,
        seed: int,
    ) -> None:
        self.student, self.config = student, config
        self.settings = asdict(config) | {"seed": seed}
        self.crops, self.held_out, self.checkpoint = crops, held_out, checkpoint
        self.groups = parameter_groups(student, config, trainable_weights)
        self.rates = [group["lr"] for group in self.groups]
        bounds = len(fake_quantizers(student))
        others = len(self.groups) - bounds
        self.slower = [_SLOWER_BOUNDS] * bounds + [_SLOWER_WEIGHTS] * others
        self.parameters = [p for group in self.groups for p in group["params"]]
        self.optimizer = torch.optim.Adam(self.groups, betas=(0.9, 0.99))
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(
            self.optimizer, max(config.iterations, 1)
        )
        self.generator = torch.Generator().manual_seed(seed)
        self.loss = DistillationLoss(teacher, blocks, config)
        self.augments = config.augments(len(crops))
        if not self.augments:  # else few come again
            self.loss.prepare(crops)
        self.held_out_targets = _outputs(teacher, held_out)

    @contextmanager
    def only_trained_parameters_need_gradients(self) -> Iterator[None]:
        trained = {id(p) for p in self.parameters}
        before = [(p, p.requires_grad) for p in self.student.parameters()]
        for parameter, _ in before:
            parameter.requires_grad_(id(parameter) in trained)
        try:
            yield
        finally:
            for parameter, needed in before:
                parameter.requires_grad_(needed)
                parameter.grad = None

    def train(self, progress: Callable[[int, float], object]) -> DistillationResult:
        initial = best = self.validate()
        best_iteration, best_parameters = 0, self.snapshot()
        start = 0
        if self.checkpoint is not None and self.checkpoint.exists():
            state = self.load(self.checkpoint)
            start, initial = state["iteration"], state["initial_loss"]
            best, best_iteration = state["best_loss"], state["best_iteration"]
            best_parameters = state["best_parameters"]
        for iteration in range(start, self.config.iterations):
            loss = self.step()
            progress(iteration + 1, loss)
            done = iteration + 1
            if done % self.config.validate_every and done != self.config.iterations:
                continue
            if (held_out_loss := self.validate()) < best:
                best, best_iteration, best_parameters = held_out_loss, done, self.snapshot()
            elif best_iteration == 0 and held_out_loss > _HARM * initial:
                self.start_again(best_parameters)
            if self.checkpoint is not None:
                self.save(
                    self.checkpoint,
                    iteration=done,
                    initial_loss=initial,
                    best_loss=best,
                    best_iteration=best_iteration,
                    best_parameters=best_parameters,
                )
        self.restore(best_parameters)
        return DistillationResult(
            initial, best, best_iteration, self.config.iterations, self.restarts
        )

    def step(self) -> float:
        index = torch.randint(len(self.crops), (self.config.batch_size,), generator=self.generator)
        crops = self.crops[index]
        if self.augments:
            crops = augmented(crops, self.generator)
        loss = torch.stack([*self.loss(self.student, crops).values()]).sum()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        return loss.item()

    def validate(self) -> float:
        difference = _outputs(self.student, self.held_out) - self.held_out_targets
        return float(difference.abs().mean())

    @property
    def restarts(self) -> int:
        """As the rates tell, which a resumed training finds lowered."""
        lowered = self.rates[0] / self.scheduler.base_lrs[0]
        return round(math.log(lowered, self.slower[0]))

    def start_again(self, parameters: Sequence[Tensor]) -> None:
        """From ``parameters``, at lower rates: how low they must be goes by how little error there is."""
        self.restore(parameters)
        self.optimizer.state.clear()
        for group, divisor in zip(self.optimizer.param_groups, self.slower, strict=True):
            group["lr"] /= divisor
            group["initial_lr"] /= divisor
        rates = zip(self.scheduler.base_lrs, self.slower, strict=True)
        self.scheduler.base_lrs = [rate / divisor for rate, divisor in rates]

    @torch.no_grad()
    def restore(self, parameters: Sequence[Tensor]) -> None:
        for parameter, value in zip(self.parameters, parameters, strict=True):
            parameter.copy_(value)

    def snapshot(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.parameters]

    def save(self, path: Path, **state: Any) -> None:
        state |= {
            "config": self.settings,
            "parameters": self.snapshot(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "generator": self.generator.get_state(),
        }
        with replacing(path) as temporary:
            torch.save(state, temporary)

    def load(self, path: Path) -> dict[str, Any]:
        state: dict[str, Any] = torch.load(path, weights_only=True)
        if asdict(DistillationConfig()) | state["config"] != self.settings:
            raise InputError(
                f"{path} was made with other distillation settings: run without --resume to start anew"
            )
        self.restore(state["parameters"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.generator.set_state(state["generator"])
        return state


@torch.no_grad()
def _outputs(network: nn.Module, inputs: Tensor, batch_size: int = 4) -> Tensor:
    return torch.cat([network(batch) for batch in inputs.split(batch_size)])
