import copy
import dataclasses
import itertools
import pickle

import pytest
import torch
from torch import nn

from condiquant_plugin import FakeQuantizer, InputError, fake_quantizers
from condiquant_plugin.distillation import (
    DistillationConfig,
    captured,
    distill,
    feature_blocks,
    feature_loss,
    loop,
)

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


def test_the_best_of_all_validations_is_kept():
    student, teacher, crops, held_out, weights = networks()
    config = dataclasses.replace(CONFIG, validate_every=2, iterations=39, bounds_rate=2e-3)
    seen, kept = {}, {}

    def validate(iteration: int, _loss: float = 0.0) -> None:
        with torch.no_grad():
            seen[iteration] = (student(held_out) - teacher(held_out)).abs().mean().item()
        kept[iteration] = parameters(student)

    validate(0)
    arguments = {"trainable_weights": weights, "progress": validate}
    result = distill(student, teacher, crops, held_out, config, **arguments)
    validated = {i: loss for i, loss in seen.items() if i % 2 == 0 or i == 39}
    best = min(validated, key=validated.__getitem__)
    assert result.initial_loss == pytest.approx(seen[0])
    assert (result.best_iteration, result.best_loss) == (best, pytest.approx(seen[best]))
    assert result.iterations == len(seen) - 1 == 39
    assert all(torch.equal(a, b) for a, b in zip(kept[best], student.parameters(), strict=True))
    later = [loss for i, loss in validated.items() if i > best]
    assert any(seen[best] < loss < seen[0] for loss in later)


def test_a_first_step_moves_every_bound_by_its_rate_times_the_range():
    student, teacher, crops, held_out, weights = networks()
    rows = FakeQuantizer(4, "weight", row_blocks=4)
    student[0].weight_quantizer = rows
    student[2].input_quantizer.set_bounds(-30.0, 70.0)
    rows.set_bounds(torch.tensor([-0.1, -0.2, -0.3, -0.4]), torch.tensor([0.1, 0.2, 0.5, 0.6]))
    before = {n: (q.lower.clone(), q.upper.clone()) for n, q in fake_quantizers(student).items()}
    start = [w.detach().clone() for w in weights]
    moved = {}

    def compare(_iteration: int, _loss: float) -> None:
        for name, quantizer in fake_quantizers(student).items():
            ends = zip((quantizer.lower, quantizer.upper), before[name], strict=True)
            moved[name] = torch.stack([(now - old).detach().abs().max() for now, old in ends])
        steps = [(now - old).abs().max() for now, old in zip(weights, start, strict=True)]
        moved["weights"] = torch.stack(steps)

    config = DistillationConfig(iterations=1, bounds_rate=1e-2, weights_rate=3e-4, augment=False)
    arguments = {"trainable_weights": weights, "progress": compare}
    distill(student, teacher, crops, held_out, config, **arguments)
    for name, (lower, upper) in before.items():
        expected = 1e-2 * (upper - lower).mean().expand(2)
        torch.testing.assert_close(moved[name], expected, rtol=1e-2, atol=0)
    torch.testing.assert_close(moved["weights"], torch.full((4,), 3e-4), rtol=1e-2, atol=0)


def test_the_rate_falls_to_zero_by_the_last_iteration():
    student, teacher, crops, held_out, _ = networks()
    uppers = [student[0].input_quantizer.upper.item()]

    def keep(_iteration: int, _loss: float) -> None:
        uppers.append(student[0].input_quantizer.upper.item())

    distill(student, teacher, crops, held_out, CONFIG, progress=keep)
    steps = [abs(b - a) for a, b in itertools.pairwise(uppers)]
    assert steps[0] == max(steps)
    assert max(steps[-2:]) < 0.02 * steps[0]


def test_the_feature_loss_is_added_in_proportion_to_its_weight():
    losses = []
    for feature_weight in (0.0, 0.5, 2.0):
        student, teacher, crops, held_out, _ = networks()
        config = dataclasses.replace(
            CONFIG, iterations=1, feature_weight=feature_weight, augment=False
        )
        arguments = {"blocks": ["0", "2"], "progress": lambda _, loss: losses.append(loss)}
        distill(student, teacher, crops, held_out, config, **arguments)
    index = torch.randint(len(crops), (2,), generator=torch.Generator().manual_seed(0))
    student, *_ = networks()
    with (
        torch.no_grad(),
        captured(student, ["0", "2"]) as ours,
        captured(teacher, ["0", "2"]) as theirs,
    ):
        output = (student(crops[index]) - teacher(crops[index])).abs().mean()
    features = feature_loss([ours["0"], ours["2"]], [theirs["0"], theirs["2"]])
    assert features > 0.01
    for feature_weight, loss in zip((0.0, 0.5, 2.0), losses, strict=True):
        assert loss == pytest.approx(float(output + feature_weight * features), rel=1e-5)


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


class Touching:
    """Makes a file when it is unpickled."""

    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return type(self.path).touch, (self.path,)


def test_a_state_that_holds_code_does_not_run_it(tmp_path):
    state, made = tmp_path / "distillation.pt", tmp_path / "made"
    student, teacher, crops, held_out, _ = networks()
    torch.save({"config": Touching(made)}, state)
    with pytest.raises(pickle.UnpicklingError):
        distill(student, teacher, crops, held_out, CONFIG, checkpoint=state)
    assert not made.exists()


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


def test_feature_loss_is_the_mean_over_samples_and_blocks_of_distances_of_directions():
    east, north = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 5.0]])
    samples = feature_loss([torch.cat([east, east])], [torch.cat([north, east])])
    assert samples.item() == pytest.approx(2**0.5 / 2)
    assert feature_loss([east, east, east], [north, east, east]).item() == pytest.approx(2**0.5 / 3)
    assert feature_loss([0 * east], [east]).item() == pytest.approx(1.0)


def test_feature_blocks_are_the_nearest_members_of_a_list():
    block = nn.ModuleDict({"attention": nn.ModuleDict({"qkv": nn.Linear(2, 2)}), "mlp": nn.GELU()})
    body = nn.ModuleList([block, copy.deepcopy(block)])
    model = nn.ModuleDict({"head": nn.Linear(2, 2), "body": body, "end": nn.Sequential(nn.ReLU())})
    model["body"].append(nn.Sequential(nn.Linear(2, 2)))
    layers = ["head", "body.1.attention.qkv", "body.0.mlp", "body.1.mlp", "end.0", "body.2.0"]
    assert feature_blocks(model, layers) == ["body.1", "body.0", "body.2"]


def test_a_network_keeps_which_of_its_parameters_are_trained():
    student, teacher, crops, held_out, _weights = networks()
    frozen = student[0].conv.bias.requires_grad_(False)
    needed = []

    def keep(_iteration: int, _loss: float) -> None:
        needed.append([p.requires_grad for p in student.parameters()])

    config = dataclasses.replace(CONFIG, iterations=1)
    distill(student, teacher, crops, held_out, config, progress=keep)
    bounds = {id(b) for q in fake_quantizers(student).values() for b in (q.lower, q.upper)}
    assert needed == [[id(p) in bounds for p in student.parameters()]]
    assert [p is not frozen for p in student.parameters()] == [
        p.requires_grad for p in student.parameters()
    ]


HARSH = dataclasses.replace(
    CONFIG, iterations=60, validate_every=5, bounds_rate=0.5, weights_rate=0.3
)
"""Rates at which nothing gets better."""


def test_rates_that_only_do_harm_are_lowered():
    student, teacher, crops, held_out, weights = networks()
    result = distill(student, teacher, crops, held_out, HARSH, trainable_weights=weights)
    assert result.best_loss < result.initial_loss
    assert result.restarts > 0
    student, teacher, crops, held_out, weights = networks()
    mild = distill(student, teacher, crops, held_out, CONFIG, trainable_weights=weights)
    assert mild.restarts == 0


def test_lowered_rates_outlive_an_interruption(tmp_path):
    def train(checkpoint, stop=None):
        def progress(iteration, _):
            if iteration == stop:
                raise KeyboardInterrupt

        student, teacher, crops, held_out, weights = networks()
        result = distill(
            student, teacher, crops, held_out, HARSH, trainable_weights=weights,
            checkpoint=tmp_path / checkpoint, progress=progress,
        )  # fmt: skip
        return result, parameters(student)

    expected, trained = train("whole.pt")
    with pytest.raises(KeyboardInterrupt):
        train("stopped.pt", stop=17)
    found, again = train("stopped.pt")
    assert found == expected
    assert all(map(torch.equal, again, trained))


@pytest.mark.parametrize(("losses", "restarts"), [([1.05, 1.09, 0.9], 0), ([1.05, 1.2, 0.9], 1)])
def test_what_falling_rates_mend_is_no_reason_to_start_again(monkeypatch, losses, restarts):
    found = iter([1.0, *losses])
    monkeypatch.setattr(loop._Run, "validate", lambda _run: next(found))
    student, teacher, crops, held_out, _ = networks()
    config = dataclasses.replace(CONFIG, iterations=3, validate_every=1)
    result = distill(student, teacher, crops, held_out, config)
    assert (result.restarts, result.best_iteration) == (restarts, 3)
