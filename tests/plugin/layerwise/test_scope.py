import pytest
from hypothesis import given
from hypothesis import strategies as st

from condiquant_plugin import InputError
from condiquant_plugin.layerwise.scope import select_layers

KINDS = ("linear", "convolution", "product")
networks = st.lists(st.sampled_from(KINDS), min_size=1, max_size=8).map(
    lambda kinds: [(kind, place) for place, kind in enumerate(kinds)]
)


def select(found, scope, excluded=(), *, others=False):
    return select_layers(
        found,
        lambda layer: layer[0],
        scope,
        is_excluded=lambda layer: layer in excluded,
        others=others,
        network="Net",
        exclusion="ignored_scope",
    )


def layers_of(kinds):
    return [(kind, place) for place, kind in enumerate(kinds.split())]


def test_scope_all_leaves_out_the_first_and_the_last_layer_but_no_product():
    found = layers_of("product convolution linear product convolution linear product")
    quantized = [layer for layer, _ in select(found, "all")]
    assert quantized == [found[i] for i in (0, 2, 3, 4, 6)]


def test_scope_transformer_leaves_out_convolutions():
    found = layers_of("convolution linear product convolution linear")
    quantized = [layer for layer, _ in select(found, "transformer")]
    assert quantized == [found[i] for i in (1, 2, 4)]


@given(networks, st.sampled_from(["transformer", "all"]), st.sets(st.integers(0, 7)))
def test_the_others_come_along_marked_as_out_of_scope(found, scope, excluded_places):
    excluded = [layer for layer in found if layer[1] in excluded_places]
    weighted = [layer for layer in found if layer[0] != "product"]
    inside = [
        layer
        for layer in found
        if layer not in excluded
        and (
            layer[0] != "convolution"
            if scope == "transformer"
            else layer not in (weighted[:1] + weighted[-1:])
        )
    ]
    if not inside:
        for others in (False, True):
            with pytest.raises(InputError, match=f"scope='{scope}' matches no layer of Net"):
                select(found, scope, excluded, others=others)
        return
    assert select(found, scope, excluded) == [(layer, True) for layer in inside]
    kept = [(layer, layer in inside) for layer in found if layer not in excluded]
    assert select(found, scope, excluded, others=True) == kept


@pytest.mark.parametrize(
    ("scope", "kinds", "remedy"),
    [
        ("transformer", "convolution convolution", 'use scope "all"'),
        ("all", "linear linear", "leaves out the first and the last layer"),
    ],
)
def test_a_scope_without_layers_names_the_remedy(scope, kinds, remedy):
    with pytest.raises(InputError, match=f"{remedy}.*check ignored_scope"):
        select(layers_of(kinds), scope)


def test_a_network_without_layers_is_refused():
    with pytest.raises(InputError, match=r"Net has no linear layer.*nothing to quantize"):
        select([], "all")
