"""Bits by a word."""

import pytest

from condiquant_recipes.presets import PRESETS, Preset
from condiquant_recipes.recipe import load_recipe


@pytest.mark.parametrize(
    ("preset", "bits", "trained"),
    [("int8", (8, 8), False), ("small", (4, 8), True), ("4bit", (4, 4), True)],
)
def test_a_preset_sets_bits_and_leaves_the_rest(tmp_path, preset, bits, trained):
    path = tmp_path / "recipe.yml"
    path.write_text("{name: a, scale: 2, path: {pretrain_network_g: net.pth}}")
    plain, chosen = load_recipe(path), load_recipe(path, PRESETS[Preset(preset)])
    assert chosen.bits == bits
    assert bool(chosen.condiquant.distillation.iterations) == trained
    assert chosen.condiquant.scope == plain.condiquant.scope
    # What a user sets wins over a preset.
    own = load_recipe(path, [*PRESETS[Preset(preset)], "condiquant.weight_bits=3"])
    assert own.bits.weight == 3
