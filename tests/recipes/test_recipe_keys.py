"""Keys, choices and defaults of a recipe are those of the method's own settings."""

from dataclasses import asdict, fields, replace
from typing import get_type_hints

import pytest

import condiquant_nncf
from condiquant_plugin.configuration import QuantizationConfig
from condiquant_plugin.distillation import DistillationConfig
from condiquant_plugin.errors import InputError
from condiquant_plugin.layerwise.precision import LayerRule
from condiquant_plugin.methods.condiquant.reconditioning import (
    KEYS_OF_OBJECTIVE,
    ReconditioningConfig,
    default_config,
)
from condiquant_recipes import settings
from condiquant_recipes.recipe import (
    BOUNDS_KEYS,
    CondiQuantSection,
    ReconditionSection,
    load_recipe,
    with_overrides,
)
from condiquant_recipes.training.options import _ELSEWHERE


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yml"
    path.write_text("{name: a, scale: 2, path: {pretrain_network_g: net.pth}}")
    return load_recipe(path)


def names(config) -> set[str]:
    return {field.name for field in fields(config)}


def test_every_key_of_the_method_can_be_set(recipe):
    section = CondiQuantSection.model_fields
    elsewhere = {"recondition", "zero_on_grid", *BOUNDS_KEYS}
    assert names(QuantizationConfig) - section.keys() == elsewhere - {"recondition"}
    assert set(BOUNDS_KEYS.values()) < type(recipe.condiquant.bounds).model_fields.keys()
    assert names(ReconditioningConfig) <= ReconditionSection.model_fields.keys()
    assert section["distillation"].annotation is DistillationConfig
    assert _ELSEWHERE.keys() < names(DistillationConfig)
    assert {key for keys in KEYS_OF_OBJECTIVE.values() for key in keys} | {"objective"} == names(
        ReconditioningConfig
    )
    types = get_type_hints(QuantizationConfig)
    for key in names(QuantizationConfig) - elsewhere:
        assert section[key].annotation == types[key]


@pytest.mark.parametrize("bits", range(2, 9))
def test_an_empty_recipe_is_the_methods_defaults(recipe, bits):
    recipe = with_overrides(recipe, [f"condiquant.activation_bits={bits}"])
    expected = condiquant_nncf.QuantizationConfig(activation_bits=bits)
    assert settings.quantization(recipe) == expected
    damped = with_overrides(recipe, ["condiquant.recondition.damping=0.3"])
    default = replace(default_config(bits), damping=0.3)
    assert settings.quantization(damped).recondition == default
    assert recipe.condiquant.distillation == DistillationConfig()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("weight_bits=9", "condiquant.weight_bits=9 is not supported: use an integer from 2 to 8"),
        ("other_bits=1", "condiquant.other_bits=1 is not supported: use an integer from 2 to 8"),
        ("scope=none", "condiquant.scope='none': Input should be 'transformer' or 'all'"),
        ("bounds.inputs=x", "condiquant.bounds.inputs='x': Input should be 'quantized' or 'float'"),
        (
            "bounds.inpts=float",
            "unknown key condiquant.bounds.inpts: did you mean condiquant.bounds.i",
        ),
        ("activation_side=auto", "unknown key condiquant.activation_side: "),
        ("recondition.steps=0", "condiquant.recondition.steps=0: use at least 1"),
        ("recondition.strength=-1", "condiquant.recondition.strength=-1.0: use more than 0"),
        ("recondition.damping=0", "condiquant.recondition.damping=0.0: use more than 0"),
        ("recondition.dampin=1", "unknown key condiquant.recondition.dampin: did you mean"),
        ("recondition.objective=x", "condiquant.recondition.objective='x': Input should be "),
        (
            "distillation.autocast=2",
            "condiquant.distillation.autocast=2: Input should be a valid bool",
        ),
    ],
)
def test_values_out_of_range_are_named_in_full(recipe, override, message):
    with pytest.raises(InputError) as info:
        with_overrides(recipe, [f"condiquant.{override}"])
    assert str(info.value).startswith(message)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize("change", [{"steps": 0}, {"damping": 0}, {"objective": "x"}])
def test_the_method_itself_refuses_them(change):
    with pytest.raises(InputError, match=f"^{next(iter(change))}="):
        ReconditioningConfig(**change)


def test_recipes_from_before_a_key_are_the_same_recipe(recipe):
    """The digest of an earlier version, from which finished runs go on, with its defaults."""
    before = {
        "iterations": 800,
        "validate_every": 100,
        "bounds_rate": 2e-3,
        "weights_rate": 5e-4,
        "augment": "false",
    }
    recipe = with_overrides(
        recipe, [f"condiquant.distillation.{key}={value}" for key, value in before.items()]
    )
    assert recipe.digest() == "b715fe2405b644db446abb8992e0e4ac7178f6ed40a3046ee73778d8a582c707"
    for key, value in {"autocast": True, "augment": True, "rate": 0.02}.items():
        changed = with_overrides(recipe, [f"condiquant.distillation.{key}={value}"])
        assert changed.digest() != recipe.digest()
        assert asdict(changed.condiquant.distillation)[key] == value


def test_rules_of_layers_from_a_file_or_in_place(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    path = tmp_path / "sub" / "recipe.yml"
    plain = "name: a\nscale: 2\npath: {pretrain_network_g: net.pth}\n"
    path.write_text(plain + "condiquant: {layers: bits.yml}\n")
    (path.parent / "bits.yml").write_text("'*.qkv': {weight_bits: 8}\n")
    expected = {"*.qkv": LayerRule(8)}
    assert settings.quantization(load_recipe(path)).layers == expected
    in_place = ["condiquant.layers={'*.qkv': {weight_bits: 8}}"]
    path.write_text(plain)
    recipe = load_recipe(path)
    assert settings.quantization(load_recipe(path, in_place)).layers == expected
    monkeypatch.chdir(path.parent)
    changed = with_overrides(recipe, ["condiquant.layers=bits.yml"])
    assert settings.quantization(changed).layers == expected
    assert changed.digest() != recipe.digest()
    with pytest.raises(InputError, match=r"unknown key .*weight_bit: did you mean .*weight_bits\?"):
        load_recipe(path, ["condiquant.layers={'*.qkv': {weight_bit: 8}}"])
    with pytest.raises(InputError, match=r"layers\['\*'\]\.weight_bits=12 is not supported"):
        load_recipe(path, ["condiquant.layers={'*': {weight_bits: 12}}"])
    with pytest.raises(InputError, match=r"none\.yml"):
        load_recipe(path, ["condiquant.layers=none.yml"])
