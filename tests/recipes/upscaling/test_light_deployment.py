import subprocess
import sys

import pytest
import torch

from condiquant_basicsr import write_image

_HEAVY = ("torch", "nncf", "basicsr", "brevitas", "spandrel", "torchvision")
_LIBRARIES = {"numpy", "openvino", "pyvips", "pyvips_binary", "_libvips", "_cffi_backend", "cffi"}
_LIBRARIES |= {"platformdirs", "psutil", "typer", "rich", "packaging"}
_LIBRARIES |= {"pydantic", "pydantic_core", "annotated_types", "typing_inspection"}  # Typer's own
_LIBRARIES |= {"typing_extensions"}
_SCRIPT = """
import sys
from condiquant_recipes import cli

sys.argv = ["condiquant", *sys.argv[1:]]
try:
    cli.main()
except SystemExit as exit:
    assert not exit.code, exit.code
print(*{name.partition(".")[0] for name in sys.modules} - sys.stdlib_module_names)
"""
_HIDING = """
import sys
sys.modules[sys.argv.pop(1)] = None
from condiquant_recipes import cli
sys.argv[0] = "condiquant"
cli.main()
"""


def called(script, *arguments):
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def loaded_by(*arguments):
    ran = called(_SCRIPT, *arguments)
    assert ran.returncode == 0, ran.stderr
    return set(ran.stdout.split("\n")[-2].split())


@pytest.fixture
def low(tmp_path):
    write_image(tmp_path / "low.png", torch.rand(3, 20, 30))
    return tmp_path / "low.png"


def test_a_picture_loads_openvino_numpy_and_libvips(model, low, tmp_path):
    found = loaded_by("upscale", model, low, tmp_path / "high.png", "-q")
    assert (tmp_path / "high.png").exists()
    assert {"numpy", "openvino", "pyvips"} <= found
    brought = {*_LIBRARIES, "condiquant_recipes", "condiquant_openvino", "condiquant_plugin"}
    others = found - brought - brought_by("typer") - brought_by("openvino")
    assert {name for name in others if not name.startswith("_sysconfigdata")} == set()
    assert found.isdisjoint({*_HEAVY, "cv2", "av", "PIL", "scipy"})


def brought_by(package):
    """Modules that a package loads of its own accord."""
    script = f"import {package}, sys; from typer.main import get_command; print(*sys.modules)"
    names = called(script).stdout.split()
    return {name.partition(".")[0] for name in names}


def test_inspecting_an_ir_loads_no_framework(model):
    assert not loaded_by("inspect", model / "model.xml", "--layers").intersection(_HEAVY)


@pytest.mark.parametrize("package", ["pyvips", "av"])
def test_an_absent_library_is_named_with_its_extra(model, low, tmp_path, package):
    video = tmp_path / "low.mp4"
    video.touch()
    source = {"pyvips": low, "av": video}[package]
    ran = called(_HIDING, package, "upscale", model, source, tmp_path / "high.png", "-q")
    remedy = f'this command needs {package}: pip install "condiquant-plugin[upscale]"'
    assert ran.stderr == f"condiquant: error: {remedy}\n"
    assert ran.returncode == 2
