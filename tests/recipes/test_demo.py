"""What ``condiquant demo`` compares and draws; the demo itself takes minutes."""

import torch

from condiquant_basicsr import read_image
from condiquant_recipes import demo
from condiquant_recipes.comparison.contenders import all_contenders, choose
from condiquant_recipes.recipe import load_recipe
from condiquant_recipes.recipe_files import recipe_path
from condiquant_recipes.reporting import with_error_maps


def test_the_methods_are_those_of_a_comparison_at_its_bits():
    recipe = load_recipe(recipe_path("dat_light/x4.yml"), demo._SETTINGS)
    chosen = [method.id for method in choose(all_contenders(recipe), demo.METHODS)]
    assert set(chosen) == {"float", *demo.METHODS}
    assert set(demo._DRAWN) <= set(chosen)


def test_photographs_are_disjoint_and_the_drawn_part_lies_inside(tmp_path):
    demo.write_photographs(tmp_path)
    calibrated = {file.stem for file in (tmp_path / "calibration").iterdir()}
    scored = {file.stem: file for file in (tmp_path / "photographs" / "HR").iterdir()}
    assert len(calibrated) == 4
    assert not calibrated & scored.keys()
    whole = read_image(scored[demo._SHOWN])
    height, width = (part.stop - part.start for part in demo._PART)
    assert whole[:, *demo._PART].shape == (3, height, width)


def test_errors_are_drawn_below_their_image(tmp_path):
    original = torch.full((3, 40, 60), 0.5)
    wrong = original.clone()
    wrong[:, :, 30:] = 0.9
    path = tmp_path / "picture.png"
    with_error_maps({"right": original, "wrong": wrong}, original, path)
    drawn = read_image(path).mean(0)
    below = drawn[drawn.shape[0] * 3 // 4]
    third = len(below) // 3
    dark = below < 0.05
    assert dark[third // 2]
    assert dark[third : 2 * third].any()
    assert (below[third : 2 * third] > 0.7).any()
