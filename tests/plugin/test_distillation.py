import copy
import dataclasses

import pytest
import torch
from torch import nn

from condiquant_plugin import FakeQuantizer, InputError, fake_quantizers
from condiquant_plugin.distillation import DistillationConfig, distill, feature_loss

CONFIG = DistillationConfig(iterations=40, validate_every=10, weights_rate=1e-3)


class QuantizedConv(nn.Module):
    """A convolution with fake quantizers on input and weight."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv
        self.input_quantizer = FakeQuantizer(2, "activation")
        self.weight_quantizer = FakeQuantizer(2, "weight")

    def forward(self, x):
        weight = self.weight_quantizer(self.conv.weight)
        return nn.functional.conv2d(self.input_quantizer(x), weight, self.conv.bias, padding=1)


def networks():
    torch.manual_seed(0)
    teacher = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.GELU(), nn.Conv2d(8, 12, 3, padding=1), nn.PixelShuffle(2)
    )
    student = copy.deepcopy(teacher)
    for index in (0, 2):
        student[index] = QuantizedConv(student[index])
    crops = torch.rand(12, 3, 8, 8)
    for quantizer in fake_quantizers(student).values():
        quantizer.search_on_next_input = True
    with torch.no_grad():
        student(crops)
    weights = [p for i in (0, 2) for p in student[i].conv.parameters()]
    return student, teacher, crops[:8], crops[8:], weights


def parameters(network):
    return [p.detach().clone() for p in network.parameters()]


def test_distillation_brings_the_student_closer_and_leaves_the_teacher_alone():
    student, teacher, crops, held_out, weights = networks()
    before = parameters(teacher)
    result = distill(student, teacher, crops, held_out, CONFIG, trainable_weights=weights)
    assert result.best_loss < 0.9 * result.initial_loss
    with torch.no_grad():
        loss = (student(held_out) - teacher(held_out)).abs().mean()
    assert loss.item() == pytest.approx(result.best_loss, rel=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(before, teacher.parameters(), strict=True))
    assert all(p.requires_grad and p.grad is None for p in student.parameters())


def test_without_weights_only_bounds_move():
    student, teacher, crops, held_out, weights = networks()
    before = [w.detach().clone() for w in weights]
    bounds = [q.upper.item() for q in fake_quantizers(student).values()]
    config = dataclasses.replace(CONFIG, weights=False)
    distill(student, teacher, crops, held_out, config, trainable_weights=weights)
    assert all(torch.equal(a, b) for a, b in zip(before, weights, strict=True))
    assert bounds != [q.upper.item() for q in fake_quantizers(student).values()]


def test_the_checkpoint_that_did_best_on_held_out_crops_is_kept():
    student, teacher, crops, held_out, weights = networks()
    start = parameters(student)
    config = dataclasses.replace(CONFIG, weights_rate=5.0)
    result = distill(student, teacher, crops, held_out, config, trainable_weights=weights)
    assert result.best_iteration == 0
    assert all(torch.equal(a, b) for a, b in zip(start, student.parameters(), strict=True))


@pytest.mark.parametrize("feature_weight", [0.0, 0.1])
def test_an_interrupted_run_resumes_to_the_same_end(tmp_path, feature_weight):
    config = dataclasses.replace(CONFIG, feature_weight=feature_weight)
    student, teacher, crops, held_out, weights = networks()
    whole = distill(
        student, teacher, crops, held_out, config, trainable_weights=weights, blocks=["0", "2"]
    )
    unbroken = parameters(student)

    class Interrupt(Exception):
        pass

    def stop(iteration: int, _loss: float) -> None:
        if iteration == 27:
            raise Interrupt

    state = tmp_path / "distillation.pt"
    student, teacher, crops, held_out, weights = networks()
    arguments = {"trainable_weights": weights, "blocks": ["0", "2"], "checkpoint": state}
    with pytest.raises(Interrupt):
        distill(student, teacher, crops, held_out, config, progress=stop, **arguments)
    student, teacher, crops, held_out, weights = networks()
    arguments["trainable_weights"] = weights
    seen = []
    resumed = distill(
        student,
        teacher,
        crops,
        held_out,
        config,
        progress=lambda iteration, _: seen.append(iteration),
        **arguments,
    )
    assert seen[0] == 21
    assert resumed == whole
    assert all(torch.equal(a, b) for a, b in zip(unbroken, student.parameters(), strict=True))
    assert [p.name for p in tmp_path.iterdir()] == ["distillation.pt"]


def test_a_state_of_other_settings_is_refused(tmp_path):
    state = tmp_path / "distillation.pt"
    student, teacher, crops, held_out, _ = networks()
    distill(student, teacher, crops, held_out, CONFIG, checkpoint=state)
    other = dataclasses.replace(CONFIG, iterations=50)
    with pytest.raises(InputError, match="other distillation settings"):
        distill(student, teacher, crops, held_out, other, checkpoint=state)


def test_a_diverging_loss_is_an_error_that_names_the_rates():
    student, teacher, crops, held_out, weights = networks()
    with torch.no_grad():
        weights[1].fill_(float("nan"))
    with pytest.raises(InputError, match=r"weights_rate"):
        distill(student, teacher, crops, held_out, CONFIG, trainable_weights=weights)


def test_feature_loss_ignores_scale_and_does_not_depend_on_size():
    small, large = torch.randn(2, 4, 3, 3), torch.randn(2, 64, 30, 30)
    assert feature_loss([small], [3 * small]) < 1e-6
    assert feature_loss([small, large], [-small, -large]).item() == pytest.approx(2.0)
