from itertools import pairwise

import pytest

from condiquant_plugin.errors import InputError
from condiquant_recipes.budgets import BUDGETS
from condiquant_recipes.recipe import load_recipe, with_overrides
from condiquant_recipes.recipe_files import find_recipe, ready_recipes, recipe_path


def recipe(tmp_path, text="", *overrides):
    path = tmp_path / "recipe.yml"
    path.write_text(f"{{name: a, scale: 2, path: {{pretrain_network_g: net.pth}}{text}}}")
    return load_recipe(path, overrides)


def cost(recipe):
    calibration, condiquant = recipe.datasets.calibration, recipe.condiquant
    return calibration.count, condiquant.bounds.crops, condiquant.distillation.iterations


def test_each_budget_takes_longer_than_the_one_before(tmp_path):
    costs = [cost(recipe(tmp_path, f", budget: {name}")) for name in BUDGETS]
    assert list(BUDGETS) == ["quick", "standard", "thorough"]
    for less, more in pairwise(costs):
        assert all(a < b for a, b in zip(less, more, strict=True))
    assert cost(recipe(tmp_path)) == costs[1]


def test_given_keys_go_before_the_budget(tmp_path):
    text = ", budget: quick, condiquant: {distillation: {iterations: 7}, weight_bits: 3}"
    found = recipe(tmp_path, text, "datasets.calibration.count=5")
    quick = recipe(tmp_path, ", budget: quick")
    assert cost(found) == (5, quick.condiquant.bounds.crops, 7)
    assert found.condiquant.distillation.validate_every == 10
    assert found.condiquant.weight_bits == 3
    assert recipe(tmp_path, "", "budget=quick") == quick


def test_a_recipe_is_what_its_keys_are(tmp_path):
    """The whole recipe, as a finished run has it, does not change with what a budget may come to mean."""
    quick = recipe(tmp_path, ", budget: quick")
    path = tmp_path / "whole.yml"
    path.write_text(quick.to_yaml())
    assert load_recipe(path) == quick
    path.write_text(quick.to_yaml().replace("budget: quick", "budget: thorough"))
    assert load_recipe(path).digest() == quick.digest()


def test_a_whole_recipe_takes_another_budget(tmp_path):
    found = with_overrides(
        recipe(tmp_path), ["condiquant.distillation.iterations=3", "budget=quick"]
    )
    assert cost(found) == (*cost(recipe(tmp_path, ", budget: quick"))[:2], 3)


def test_an_unknown_budget_is_named(tmp_path):
    with pytest.raises(InputError, match="budget='slow': Input should be 'quick', 'standard' or"):
        recipe(tmp_path, ", budget: slow")
    with pytest.raises(InputError, match="budget='slow'"):
        with_overrides(recipe(tmp_path), ["budget=slow"])


@pytest.mark.parametrize("ready", ready_recipes())
def test_ready_recipes_leave_time_to_the_budget(ready):
    path = recipe_path(ready)
    for name in BUDGETS:
        expected = find_recipe(path, [f"budget={name}"])
        assert cost(expected) != cost(find_recipe(path, ["budget=standard"])) or name == "standard"


def test_a_recipe_has_its_own_word_on_budgets(tmp_path):
    own = ", budgets: {standard: {condiquant: {distillation: {iterations: 9}}}}"
    found = recipe(tmp_path, own)
    assert cost(found) == (*cost(recipe(tmp_path))[:2], 9)
    assert cost(recipe(tmp_path, own, "condiquant.distillation.iterations=3"))[2] == 3
    quick = cost(recipe(tmp_path, "", "budget=quick"))
    assert cost(recipe(tmp_path, own, "budget=quick")) == quick
    assert (
        cost(with_overrides(with_overrides(found, ["budget=quick"]), ["budget=standard"]))[2] == 9
    )
    assert (
        found.digest() == recipe(tmp_path, ", condiquant: {distillation: {iterations: 9}}").digest()
    )
    with pytest.raises(InputError, match="budgets"):
        recipe(tmp_path, ", budgets: {slow: {}}")
