"""DQC: bounds, and optionally weights, trained so that the quantized network follows the float one.

After 2DQuant (arXiv 2406.06649, section 3.3). Differences: the feature loss is the mean over blocks of a
relative distance, so it neither vanishes nor grows with depth; every bound moves at a rate relative to the
mean range of its quantizer; the checkpoint is chosen on held-out calibration crops.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from condiquant_plugin.errors import InputError
from condiquant_plugin.files import replacing
from condiquant_plugin.uniform.fake_quantizer import fake_quantizers


@dataclass(frozen=True)
class DistillationConfig:
    """Settings of :func:`distill`.

    Raises:
        InputError: a value out of range.
    """

    iterations: int = 800
    batch_size: int = 2
    bounds_rate: float = 2e-3
    """Adam's rate for a bound, in units of its range."""
    weights: bool = True
    """Train weights and biases of the quantized layers too."""
    weights_rate: float = 5e-4
    feature_weight: float = 0.0
    """Factor of the per-block feature loss; 0 leaves it out and saves the teacher's forward pass."""
    validate_every: int = 100

    def __post_init__(self) -> None:
        for name, least in {"iterations": 0, "batch_size": 1, "validate_every": 1}.items():
            if getattr(self, name) < least:
                raise InputError(f"{name}={getattr(self, name)}: use at least {least}")
        for name in ("bounds_rate", "weights_rate"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name}={getattr(self, name)}: use more than 0")
        if not self.feature_weight >= 0:
            raise InputError(f"feature_weight={self.feature_weight}: use 0 or more")


@dataclass(frozen=True)
class DistillationResult:
    """What a distillation did; losses are mean absolute differences to the float output."""

    initial_loss: float
    best_loss: float
    best_iteration: int
    iterations: int


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
        self.student, self.teacher, self.config = student, teacher, config
        self.settings = asdict(config) | {"seed": seed}
        self.crops, self.held_out, self.checkpoint = crops, held_out, checkpoint
        self.blocks = list(blocks) if config.feature_weight else []
        self.groups = parameter_groups(student, config, trainable_weights)
        self.parameters = [p for group in self.groups for p in group["params"]]
        self.optimizer = torch.optim.Adam(self.groups, betas=(0.9, 0.99))
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(
            self.optimizer, max(config.iterations, 1)
        )
        self.generator = torch.Generator().manual_seed(seed)
        self.targets = _outputs(teacher, crops)
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
            if self.checkpoint is not None:
                self.save(
                    self.checkpoint,
                    iteration=done,
                    initial_loss=initial,
                    best_loss=best,
                    best_iteration=best_iteration,
                    best_parameters=best_parameters,
                )
        with torch.no_grad():
            for parameter, value in zip(self.parameters, best_parameters, strict=True):
                parameter.copy_(value)
        return DistillationResult(initial, best, best_iteration, self.config.iterations)

    def step(self) -> float:
        index = torch.randint(len(self.crops), (self.config.batch_size,), generator=self.generator)
        inputs = self.crops[index]
        with captured(self.student, self.blocks) as student_features:
            loss = (self.student(inputs) - self.targets[index]).abs().mean()
        if self.blocks:
            with torch.no_grad(), captured(self.teacher, self.blocks) as teacher_features:
                self.teacher(inputs)
            loss = loss + self.config.feature_weight * feature_loss(
                [student_features[b] for b in self.blocks],
                [teacher_features[b] for b in self.blocks],
            )
        value = loss.item()
        if value != value or value == float("inf"):
            raise InputError(
                f"the distillation loss became {value}: lower distillation.weights_rate "
                f"({self.config.weights_rate}) or distillation.bounds_rate ({self.config.bounds_rate})"
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        return value

    def validate(self) -> float:
        difference = _outputs(self.student, self.held_out) - self.held_out_targets
        return float(difference.abs().mean())

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
        if state["config"] != self.settings:
            raise InputError(
                f"{path} was made with other distillation settings: run without --resume to start anew"
            )
        with torch.no_grad():
            for parameter, value in zip(self.parameters, state["parameters"], strict=True):
                parameter.copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.generator.set_state(state["generator"])
        return state


def feature_blocks(model: nn.Module, layers: Iterable[str]) -> list[str]:
    """Names of the blocks that hold ``layers``: their nearest ancestors in a list of modules.

    These are the places where a quantized network is compared with the float one (2DQuant's features).
    """
    blocks: dict[str, None] = {}
    for name in layers:
        while name:
            parent, _, _ = name.rpartition(".")
            if isinstance(model.get_submodule(parent), nn.ModuleList | nn.Sequential):
                blocks[name] = None
                break
            name = parent
    return list(blocks)


def feature_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Mean over blocks and samples of ``|F/|F| - Fq/|Fq||`` in the Frobenius norm (2DQuant, equation 8).

    Args:
        student, teacher: one tensor per block, ``(batch, ...)``.
    """
    distances = []
    for quantized, reference in zip(student, teacher, strict=True):
        directions = [
            f.flatten(1) / f.flatten(1).norm(dim=1, keepdim=True).clamp_min(1e-12)
            for f in (quantized, reference)
        ]
        distances.append((directions[0] - directions[1]).norm(dim=1).mean())
    return torch.stack(distances).mean()


def parameter_groups(
    student: nn.Module, config: DistillationConfig, weights: Sequence[nn.Parameter]
) -> list[dict[str, Any]]:
    """Adam's groups: the bounds of each fake quantizer at a rate relative to their range, then the weights.

    Args:
        student: network with fake quantizers.
        weights: trained at ``config.weights_rate`` if ``config.weights``.
    """
    groups: list[dict[str, Any]] = []
    for quantizer in fake_quantizers(student).values():
        width = float((quantizer.upper - quantizer.lower).detach().abs().mean())
        groups.append(
            {
                "params": [quantizer.lower, quantizer.upper],
                "lr": config.bounds_rate * width,
                "weight_decay": 0.0,
            }
        )
    if config.weights and weights:
        groups.append({"params": list(weights), "lr": config.weights_rate})
    return groups


@torch.no_grad()
def _outputs(network: nn.Module, inputs: Tensor, batch_size: int = 4) -> Tensor:
    return torch.cat([network(batch) for batch in inputs.split(batch_size)])


@contextmanager
def captured(network: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Outputs of the named modules during the forward passes inside the block."""
    features: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda _module, _inputs, output: features.__setitem__(name, output)

    handles = [network.get_submodule(n).register_forward_hook(keep(n)) for n in names]
    try:
        yield features
    finally:
        for handle in handles:
            handle.remove()
