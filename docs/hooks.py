"""Pages that mkdocs makes from the code."""

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from condiquant_recipes.recipe_reference import reference_page


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the page of recipe keys."""
    files.append(File.generated(config, "recipe_keys.md", content=reference_page()))
    return files
