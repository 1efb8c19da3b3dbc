"""``python -m condiquant_recipes`` is the command ``condiquant``."""

from condiquant_recipes.cli import main

main()
