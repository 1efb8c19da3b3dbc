"""Commands that the documentation shows exist, with the options that it gives them."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from condiquant_recipes.cli import COMMANDS, app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
KNOWN = typer.main.get_command(app(COMMANDS)).commands


def shown(page: Path) -> list[list[str]]:
    """Words of each command in a page's shell blocks, after ``condiquant``."""
    lines = []
    for block in re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL):
        for line in re.sub(r"\\\n", " ", block).splitlines():
            if line.strip().startswith("condiquant "):
                lines.append(shlex.split(line.strip(), comments=True)[1:])
    return lines


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_and_their_options_exist(page):
    for command, *words in shown(page):
        assert command in KNOWN, command
        known = {
            option
            for parameter in KNOWN[command].params
            for option in (*parameter.opts, *parameter.secondary_opts)
        }
        for word in words:
            if re.match(r"--?[a-z]", word):
                assert word.partition("=")[0] in known, f"{command} {word}"


def test_the_pages_show_every_command():
    named = {command for page in PAGES for command, *_ in shown(page)}
    assert named == COMMANDS.keys()
