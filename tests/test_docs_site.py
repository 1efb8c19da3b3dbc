"""The documentation site: strict, with pages made from the code."""

import os
import re
import subprocess
import sys
from html import unescape
from pathlib import Path

import pytest

from condiquant_recipes.recipe import Recipe, load_recipe
from condiquant_recipes.recipe_files import ready_recipes, recipe_path
from condiquant_recipes.recipe_reference import recipe_schema

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return folder


def text_of(page: Path) -> str:
    return unescape(re.sub(r"<[^>]+>", " ", page.read_text()))


def test_every_page_is_there_and_linked(site):
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")} - {"index"} | {"recipe_keys"}
    front = (site / "index.html").read_text()
    for page in pages:
        assert (site / page / "index.html").is_file()
        assert f'href="{page}/"' in front
    assert "Quick start" in text_of(site / "index.html")
    assert not list(site.rglob("*.py"))


def flat(values, prefix=""):
    for key, value in values.items():
        if (
            isinstance(value, dict)
            and value
            and key not in ("network_g", "train", "val", "layers", "budgets")
        ):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key


def test_every_key_of_every_ready_recipe_is_in_the_reference(site):
    page = (site / "recipe_keys" / "index.html").read_text()
    sections = re.split(r"<h2 id=\"[^\"]*\">", page)[1:]
    keys = {}
    for section in sections:
        title = re.match(r"[^<]+", section)[0]
        keys[title] = set(re.findall(r"<td><code>(\w+)</code></td>", section))
    for name in ready_recipes():
        for key in flat(load_recipe(recipe_path(name)).model_dump()):
            section, _, last = key.rpartition(".")
            assert last in keys[section or "Top level"], key
    text = text_of(site / "recipe_keys" / "index.html")
    assert "What white is to the network, such as 255" in text
    assert "Rules" not in keys
    assert ":data:" not in text
    assert ":func:" not in text


def test_the_entries_are_in_the_api(site):
    page = (site / "api" / "index.html").read_text()
    for name in (
        "condiquant_nncf.quantize_network",
        "condiquant_nncf.quantize.quantize",
        "condiquant_brevitas.quantize_sr",
        "condiquant_openvino.convert",
        "condiquant_basicsr.load_network",
    ):
        assert f'id="{name}"' in page


def test_the_schema_knows_defaults_limits_and_meanings():
    schema = recipe_schema()
    assert schema["required"] == ["name", "scale", "path"]
    assert schema["properties"]["img_range"] == {
        "default": 1.0,
        "description": schema["properties"]["img_range"]["description"],
        "exclusiveMinimum": 0,
        "title": "Img Range",
        "type": "number",
    }
    bounds = schema["$defs"]["BoundsSection"]["properties"]
    assert bounds["side"]["description"] == "How ranges of activations are shrunk."
    distillation = schema["$defs"]["DistillationConfig"]["properties"]
    assert distillation["rate"]["description"].startswith("Adam's rate")
    assert Recipe.model_json_schema()["properties"].keys() == schema["properties"].keys()
