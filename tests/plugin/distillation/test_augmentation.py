"""Crops in other forms."""

import pytest
import torch
from torch import nn

from condiquant_plugin import FakeQuantizer
from condiquant_plugin.distillation import DistillationConfig, distill
from condiquant_plugin.distillation.augmentation import augmented


def forms(crop):
    """A square picture mirrored and turned: the eight symmetries of a square."""
    turned = [torch.rot90(crop, k, (-2, -1)) for k in range(4)]
    return [form for each in turned for form in (each, each.flip(-1))]


def counted(crop, kept, count):
    """How often each of ``kept`` comes of a crop augmented so many times; no other form may."""
    crops = crop.expand(count, -1, -1, -1)
    found = augmented(crops, torch.Generator().manual_seed(0))
    assert torch.equal(found, augmented(crops, torch.Generator().manual_seed(0)))
    counts = [int((found == form).flatten(1).all(1).sum()) for form in kept]
    assert sum(counts) == count
    return counts


def test_augmented_crops_are_the_symmetries_of_a_square_all_as_likely():
    crop = torch.arange(12.0).view(3, 2, 2)
    assert min(counted(crop, forms(crop), 4000)) > 400


def test_augmented_crops_that_are_no_squares_keep_their_shape():
    crop = torch.arange(18.0).view(3, 2, 3)
    kept = [crop, crop.flip(-1), crop.flip(-2), crop.flip(-2, -1)]
    assert min(counted(crop, kept, 400)) > 50


@pytest.mark.parametrize("augment", [False, True])
def test_training_sees_crops_in_other_forms_only_where_asked(augment):
    torch.manual_seed(0)
    teacher = nn.Conv2d(3, 3, 3, padding=1)
    student = nn.Sequential(FakeQuantizer(4, "activation"), teacher)
    crops, held_out = torch.rand(12, 3, 8, 8).split(8)
    seen = []
    handle = student.register_forward_pre_hook(lambda _module, inputs: seen.extend(inputs[0]))
    config = DistillationConfig(iterations=10, validate_every=20, augment=augment)
    distill(student, teacher, crops, held_out, config)
    handle.remove()
    trained = seen[len(held_out) : -len(held_out)]
    assert len(trained) == 20
    known = [form for crop in crops for form in forms(crop)]
    assert all(any(torch.equal(crop, form) for form in known) for crop in trained)
    as_they_came = [any(torch.equal(crop, each) for each in crops) for crop in trained]
    assert all(as_they_came) is not augment
