"""The wheel, built and installed outside the checkout; the command line's own options."""

import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

from condiquant_plugin import __version__

ROOT = Path(__file__).parents[1]
PACKAGES = ("plugin", "nncf", "basicsr", "brevitas", "openvino", "recipes", "transformers")


def called(*command, **options):
    ran = subprocess.run([*map(str, command)], capture_output=True, text=True, **options)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with what the wheel installs, and the environment that has only it."""
    folder = tmp_path_factory.mktemp("wheel")
    called(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=ROOT)
    (wheel,) = folder.glob("*.whl")
    quiet = ("--quiet", "--disable-pip-version-check", "--no-warn-script-location")
    target = folder / "installed"
    called(
        sys.executable, "-m", "pip", "install", *quiet, "--no-index", "--no-deps",
        "--target", target, wheel,
    )  # fmt: skip
    return wheel, target, os.environ | {"PYTHONPATH": str(target), "NO_COLOR": "1"}


def test_the_wheel_holds_the_packages_typed_and_nothing_of_the_tests(installed):
    wheel, _, _ = installed
    names = zipfile.ZipFile(wheel).namelist()
    for package in PACKAGES:
        assert f"condiquant_{package}/py.typed" in names
    assert "condiquant_recipes/recipes/dat_light/x4.yml" in names
    assert {name.partition("/")[0] for name in names} == {
        *(f"condiquant_{package}" for package in PACKAGES),
        f"condiquant_plugin-{__version__}.dist-info",
    }


def test_the_installed_command_runs_outside_the_checkout(installed, tmp_path):
    _, target, environment = installed
    command = target / "bin" / "condiquant"
    outside = {"cwd": tmp_path, "env": environment}
    assert called(command, "--version", **outside) == f"condiquant {__version__}\n"
    ready = called(sys.executable, "-m", "condiquant_recipes", "recipe", **outside).split()
    assert "swinir_light/x2.yml" in ready
    recipe = called(command, "recipe", "dat_light/x4.yml", "--set", "seed=3", **outside)
    assert yaml.safe_load(recipe)["network_g"]["type"] == "DAT"
    assert yaml.safe_load(recipe)["seed"] == 3
    code = "import condiquant_recipes as r; print(r.__file__)"
    assert called(sys.executable, "-c", code, **outside).startswith(str(target))


def test_completion_of_commands(installed, tmp_path):
    _, target, environment = installed
    asked = {
        "_CONDIQUANT_COMPLETE": "complete_bash",
        "COMP_WORDS": "condiquant qu",
        "COMP_CWORD": "1",
    }
    found = called(target / "bin" / "condiquant", cwd=tmp_path, env=environment | asked)
    assert found.split() == ["quantize"]


def test_versions_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert project["version"] == citation["version"] == __version__
    assert f"## {__version__}\n" in (ROOT / "CHANGELOG.md").read_text()
