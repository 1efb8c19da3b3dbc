import pytest

from condiquant_plugin import InputError
from condiquant_plugin.configuration import QuantizationConfig
from condiquant_plugin.distillation import DistillationConfig
from condiquant_plugin.layerwise.precision import LayerBits, LayerRule
from condiquant_plugin.methods.condiquant.reconditioning import ReconditioningConfig, default_config
from condiquant_plugin.uniform.bits import FLOAT_BITS


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight_bits": 9}, "weight_bits=9 is not supported"),
        ({"other_bits": 1}, "other_bits=1 is not supported"),
        ({"scope": "cnn"}, "scope='cnn' is not known"),
        ({"overflow": "avx"}, "overflow='avx' is not known"),
        ({"recondition": "never"}, "recondition='never' is not known"),
        (
            {"bits": 4},
            "bits is no key of the quantization: use weight_bits, activation_bits, scope",
        ),
    ],
)
def test_what_cannot_be_is_named(changes, message):
    with pytest.raises(InputError, match=message):
        QuantizationConfig().changed(changes)


def test_layers_outside_the_scope_have_bits_of_their_own():
    config = QuantizationConfig(weight_bits=2, activation_bits=3, other_bits=8)
    assert config.bits("a") == config.bits("a", in_scope=True) == LayerBits(2, 3)
    assert config.bits("a", in_scope=False) == LayerBits(8, 8)
    assert config.changed({"other_bits": None}).bits("a", in_scope=False) == LayerBits(2, 3)


def test_of_two_rules_the_later_one_has_the_last_word():
    rules = {"*.a": {"weight_bits": 6, "activation_bits": 7}, "x.*": LayerRule(weight_bits=5)}
    config = QuantizationConfig(weight_bits=2, activation_bits=3, other_bits=8, layers=rules)
    assert config.bits("x.a") == LayerBits(5, 7)
    assert config.bits("y.a", in_scope=False) == LayerBits(6, 7)
    assert config.bits("x.b", in_scope=False) == LayerBits(5, 8)
    # Of a further use of a weight, its own name.
    assert config.bits("x.a#1") == LayerBits(5, 7)
    assert config.bits("b") == LayerBits(2, 3)


def test_what_rules_leave_float():
    rules = {"b*": LayerRule("float", "float"), "*c": LayerRule(None, "float")}
    config = QuantizationConfig(layers=rules)
    assert not config.quantizes("b", has_weight=True)
    assert config.quantizes("c", has_weight=True)
    assert not config.quantizes("c", has_weight=False)
    assert config.bits("c") == LayerBits(4, FLOAT_BITS)
    quantized = config.changed({"layers": {**rules, "b": LayerRule(None, 8)}})
    assert quantized.quantizes("b", has_weight=False)
    with pytest.raises(InputError, match="what is for b leaves a weight float but not its inputs"):
        quantized.quantizes("b", has_weight=True)


def test_reconditioning_follows_the_bits_of_activations_unless_it_is_given():
    config = QuantizationConfig(activation_bits=2)
    assert config.reconditioning() == default_config(2)
    assert config.changed({"recondition": None}).reconditioning() is None
    given = ReconditioningConfig("condition")
    assert config.changed({"recondition": given}).reconditioning() is given


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("iterations", -1),
        ("batch_size", 0),
        ("validate_every", 0),
        ("rate", -0.01),
        ("bounds_rate", 0.0),
        ("weights_rate", float("nan")),
        ("feature_weight", -1e-3),
    ],
)
def test_settings_of_distillation_out_of_range(key, value):
    with pytest.raises(InputError, match=f"^{key}={value}: use "):
        DistillationConfig(**{key: value})


def test_an_unknown_augmentation_is_refused():
    with pytest.raises(InputError, match=r"^augment='flips' is not known: use "):
        DistillationConfig(augment="flips")


def test_crops_that_come_more_than_ten_times_are_augmented():
    config = DistillationConfig(iterations=50, batch_size=2)
    assert [config.augments(crops) for crops in (9, 10)] == [True, False]
    for augment in (True, False):
        given = DistillationConfig(iterations=50, batch_size=2, augment=augment)
        assert given.augments(1) is given.augments(100) is augment
