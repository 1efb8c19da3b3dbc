"""A small Llama of transformers' own architecture, and token ids and a tokenizer for it."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn

from condiquant_transformers.compatibility import heal

heal()

from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

VOCABULARY = 96


def llama(blocks=3, width=32):
    """With weights of spread magnitudes, as trained ones have."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        use_cache=False,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                nn.init.normal_(
                    parameter, std=0.3 if "embed" in name else parameter.shape[1] ** -0.5
                )
                parameter.mul_(torch.rand(parameter.shape[1]) + 0.3)
    return model


def tokens(count=3, length=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randint(VOCABULARY, (count, 1, length), generator=generator))


class Logits(nn.Module):
    """What OpenVINO converts: token ids to logits."""

    def __init__(self, model):
        super().__init__()
        self.model, self.lm_head = model.model, model.lm_head

    def forward(self, input_ids):
        length = input_ids.shape[1]
        mask = torch.full((1, 1, length, length), -1e9).triu(1)
        places = torch.arange(length)[None]
        hidden = self.model(
            input_ids=input_ids, attention_mask=mask, position_ids=places, use_cache=False
        ).last_hidden_state
        return self.lm_head(hidden)


WORDS = "the quick brown fox jumps over a lazy dog while it rains on the hill and the sea is calm\n"


def word_tokenizer():
    from transformers import PreTrainedTokenizerFast

    words = sorted({f"Ġ{word}" for word in WORDS.split()})
    vocabulary = {token: i for i, token in enumerate(["<unk>", "</s>", "Ċ", *words])}
    assert len(vocabulary) < VOCABULARY
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>", pad_token="<unk>"
    )
