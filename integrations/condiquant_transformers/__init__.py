"""Language models of Hugging Face transformers: folders, texts, perplexity, the way to OpenVINO."""

from importlib.util import find_spec

from condiquant_plugin.errors import MissingExtraError

if find_spec("transformers") is None:
    raise MissingExtraError("condiquant_transformers", "transformers", "transformers")

from condiquant_transformers.compatibility import heal

heal()

from condiquant_transformers.folder import (  # noqa: E402
    LanguageModel,
    read_folder,
    read_tokenizer,
    save_folder,
)
from condiquant_transformers.text import perplexity, windows  # noqa: E402

__all__ = [
    "LanguageModel",
    "heal",
    "perplexity",
    "read_folder",
    "read_tokenizer",
    "save_folder",
    "windows",
]
