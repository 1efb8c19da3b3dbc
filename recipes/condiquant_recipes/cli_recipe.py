"""The command ``condiquant recipe``, and ``condiquant --version``."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from condiquant_plugin import __version__
from condiquant_recipes.cli_options import SetOption


def _print_version(asked: bool) -> None:
    if asked:
        print(f"condiquant {__version__}")
        raise typer.Exit


def about(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """CondiQuant: 2-4 bit super-resolution networks as OpenVINO IR."""


def recipe(
    name: Annotated[
        str | None,
        typer.Argument(metavar="[RECIPE]", help="A recipe or a BasicSR training YAML."),
    ] = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON schema of recipes.")
    ] = False,
    overrides: SetOption = None,
) -> None:
    """Names of the ready recipes; a recipe whole, with its defaults; or the schema of all."""
    if schema:
        from condiquant_recipes.recipe_reference import recipe_schema

        print(json.dumps(recipe_schema(), indent=1))
        return
    from condiquant_recipes import recipe_files

    if name is None:
        print(*recipe_files.ready_recipes(), sep="\n")
    else:
        print(recipe_files.find_recipe(name, overrides or []).to_yaml(), end="")
