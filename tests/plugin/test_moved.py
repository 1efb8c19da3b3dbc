"""Import paths of earlier versions stay valid."""

import importlib
import sys

import pytest

import condiquant_basicsr  # noqa: F401
import condiquant_brevitas
import condiquant_nncf  # noqa: F401
import condiquant_openvino  # noqa: F401
from condiquant_plugin.moved import _MOVED


@pytest.mark.parametrize("old", sorted(_MOVED.places))
def test_an_old_path_is_the_module_of_today(old, monkeypatch):
    monkeypatch.delitem(sys.modules, old, raising=False)
    place = _MOVED.places[old]
    today = importlib.import_module(place)
    with pytest.warns(DeprecationWarning, match=f"^{old} is {place} now$"):
        assert importlib.import_module(old) is today
    assert (today.__name__, today.__spec__.name) == (place, place)


def test_names_of_a_package_that_moved_are_found_in_it():
    from condiquant_plugin import gram, reconditioning

    assert (
        gram.LayerGeometry
        is importlib.import_module("condiquant_plugin.layerwise.moments").LayerGeometry
    )
    assert reconditioning.LayerProblem


def test_an_old_name_is_what_has_another_now():
    with pytest.warns(DeprecationWarning, match="CondiQuant is .*LayerReconditioner now$"):
        assert condiquant_brevitas.CondiQuant is condiquant_brevitas.LayerReconditioner


def test_what_nothing_has_is_still_missing():
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("condiquant_plugin.nothing")
    for package in ("condiquant_plugin", "condiquant_openvino", "condiquant_brevitas"):
        with pytest.raises(AttributeError, match="nothing"):
            importlib.import_module(package).nothing  # noqa: B018
