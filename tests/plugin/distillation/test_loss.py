"""The loss of every host's training step, and the teacher's outputs that it keeps."""

import copy

import pytest
import torch
from torch import nn

from condiquant_plugin import FakeQuantizer, InputError
from condiquant_plugin.distillation import (
    DistillationConfig,
    DistillationLoss,
    OutputCache,
    distill,
    teacher,
)

CONFIG = DistillationConfig()


class Counting(nn.Module):
    """A float network that counts its forward passes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.GELU(), nn.Conv2d(8, 12, 3, padding=1)
        )
        self.runs = 0

    def forward(self, x):
        self.runs += 1
        return nn.functional.pixel_shuffle(self.body(x), 2)


def quantized(network: Counting) -> Counting:
    student = copy.deepcopy(network)
    quantizer = FakeQuantizer(4, "activation")
    quantizer.set_bounds(-1.0, 1.0)
    student.body[1] = nn.Sequential(nn.GELU(), quantizer)
    return student


@pytest.fixture
def float_network():
    return Counting()


@pytest.fixture
def crops():
    torch.manual_seed(1)
    return torch.rand(8, 3, 10, 10)


def values(losses: dict) -> dict:
    return {name: loss.item() for name, loss in losses.items()}


@pytest.mark.parametrize("autocast", [False, True])
def test_crops_that_come_again_are_found_whatever_loads_them(float_network, crops, autocast):
    config = DistillationConfig(autocast=autocast)
    student = quantized(float_network)
    loss = DistillationLoss(float_network, [], config)
    first = [values(loss(student, crops[:4])), values(loss(student, crops[4:]))]
    assert float_network.runs == 2
    again = values(loss(student, crops[:4].clone()))
    mixed = crops[[6, 0, 3, 5]]
    found = values(loss(student, mixed))
    assert float_network.runs == 2
    assert again == first[0]
    assert found == values(DistillationLoss(float_network, [], config)(student, mixed))
    assert first[0]["pix"] > 0


def test_one_crop_that_is_new_has_the_teacher_run_on_the_batch(float_network, crops):
    student = quantized(float_network)
    loss = DistillationLoss(float_network, [], CONFIG)
    loss(student, crops[:4])
    for changed in (crops[1:5], crops[:4] + 1e-7, crops[:4].double().float() * 0.5):
        runs = float_network.runs
        fresh = values(DistillationLoss(float_network, [], CONFIG)(student, changed))
        assert values(loss(student, changed)) == fresh
        assert float_network.runs == runs + 2


def test_batches_of_another_size_may_differ_in_the_last_bits(float_network, crops):
    cache = OutputCache()
    cache.keep(cache.keys(crops[:4]), crops[:4])
    assert cache.find(cache.keys(crops[:4])) is not None
    assert cache.find(cache.keys(crops[:2])) is None
    cache.add(crops[:2], crops[:2])  # which the caller takes as they are
    assert torch.equal(cache.find(cache.keys(crops[1:2])), crops[1:2])
    assert OutputCache.keys(crops.flatten(2)) != OutputCache.keys(crops)
    assert OutputCache.keys(crops.view(torch.int32)) != OutputCache.keys(crops)


def test_prepared_crops_need_no_teacher(float_network, crops):
    student = quantized(float_network)
    loss = DistillationLoss(float_network, [], CONFIG)
    loss.prepare(crops)
    assert float_network.runs == 2
    with torch.no_grad():
        expected = (student(crops[2:5]) - float_network(crops)[2:5]).abs().mean()
    runs = float_network.runs
    assert loss(student, crops[2:5])["pix"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert float_network.runs == runs


def test_crops_that_never_come_again_leave_nothing(float_network, monkeypatch):
    monkeypatch.setattr(OutputCache.__init__, "__defaults__", (3 * 20 * 20 * 4 * 10,))
    loss = DistillationLoss(float_network, [], CONFIG)
    student = quantized(float_network)
    held = []
    for seed in range(8):
        torch.manual_seed(seed)
        loss(student, torch.rand(4, 3, 10, 10))
        held.append(loss.cache.bytes)
    size = 3 * 20 * 20 * 4
    assert held == [4 * size, 8 * size, 0, 0, 0, 0, 0, 0]
    assert loss.cache.is_off
    monkeypatch.setattr(OutputCache, "keys", None)  # not even looked for
    loss(student, torch.rand(4, 3, 10, 10))
    assert float_network.runs == 9


def test_a_full_cache_goes_on_serving_what_it_has(float_network, crops):
    loss = DistillationLoss(float_network, [], CONFIG)
    loss.cache.limit = 3 * 20 * 20 * 4 * 6
    student = quantized(float_network)
    for batch in (crops[:4], crops[:4], crops[4:], crops[4:], crops[:4]):
        loss(student, batch)
    assert float_network.runs == 3
    assert loss.cache.bytes == 3 * 20 * 20 * 4 * 4
    assert teacher.CACHE_BYTES <= 2**28


def test_features_are_of_the_same_batch_and_nothing_is_kept_for_them(float_network, crops):
    config = DistillationConfig(feature_weight=0.5)
    student = quantized(float_network)
    loss = DistillationLoss(float_network, ["body.0", "body.2"], config)
    first, second = values(loss(student, crops)), values(loss(student, crops))
    assert first == second
    assert first.keys() == {"pix", "feat"}
    assert (float_network.runs, loss.cache.bytes) == (2, 0)
    assert values(DistillationLoss(float_network, ["body.0"], CONFIG)(student, crops)).keys() == {
        "pix"
    }


def test_autocast_runs_both_networks_in_bfloat16_and_the_loss_in_float32(float_network, crops):
    seen = []

    def criterion(output, target):
        seen.append((output.dtype, target.dtype, torch.equal(output, output.bfloat16().float())))
        return (output - target).square().mean()

    student = quantized(float_network)
    for autocast in (False, True):
        config = DistillationConfig(autocast=autocast)
        losses = DistillationLoss(float_network, [], config, criterion)(student, crops)
        assert losses["pix"].dtype == torch.float32
    assert seen == [(torch.float32, torch.float32, autocast) for autocast in (False, True)]


@pytest.mark.parametrize("autocast", [False, True])
def test_the_loop_distils_under_autocast_and_validates_in_float32(float_network, crops, autocast):
    student = quantized(float_network)
    config = DistillationConfig(
        iterations=30, validate_every=10, autocast=autocast, augment=False, weights_rate=5e-4
    )
    result = distill(
        student, float_network, crops[:6], crops[6:], config,
        trainable_weights=list(student.body[2].parameters()),
    )  # fmt: skip
    assert float_network.runs == 3
    assert result.best_loss < result.initial_loss
    with torch.no_grad():
        found = (student(crops[6:]) - float_network(crops[6:])).abs().mean().item()
    assert found == result.best_loss


def test_a_state_from_before_a_setting_is_resumed(float_network, crops, tmp_path):
    state = tmp_path / "distillation.pt"
    config = DistillationConfig(iterations=4, validate_every=2)
    arguments = (float_network, crops[:6], crops[6:], config)
    result = distill(quantized(float_network), *arguments, checkpoint=state)
    content = torch.load(state, weights_only=True)
    del content["config"]["autocast"]
    torch.save(content, state)
    assert distill(quantized(float_network), *arguments, checkpoint=state) == result


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_names_what_to_lower(float_network, crops, broken):
    student = quantized(float_network)
    with torch.no_grad():
        student.body[2].bias.fill_(broken)
    names = {"section": "training", "weights_rate": "train.lr"}
    for lower, given in {
        r"distillation\.rate \(0\.01\)": {},
        r"distillation\.bounds_rate \(0\.002\) or distillation\.rate \(0\.01\)": {
            "bounds_rate": 2e-3
        },
        r"distillation\.bounds_rate \(0\.002\)": {"bounds_rate": 2e-3, "weights": False},
        r"distillation\.weights_rate \(0\.0005\) or distillation\.rate \(0\.01\)": {
            "weights_rate": 5e-4
        },
        r"training\.bounds_rate \(0\.002\) or train\.lr \(0\.0005\)": {
            "bounds_rate": 2e-3,
            "weights_rate": 5e-4,
        },
    }.items():
        config = DistillationConfig(**given)
        named = names if lower.startswith("training") else {}
        message = rf"became {broken} in iteration 7: lower {lower}$"
        with pytest.raises(InputError, match=message):
            DistillationLoss(float_network, [], config, **named)(student, crops, 7)
    with pytest.raises(InputError, match="NaN or Inf in the output of the float network"):
        DistillationLoss(student, [], CONFIG)(quantized(float_network), crops)
