"""A tiny Llama as the GGUF file, in float32, that llama.cpp's own converter would make of it."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import torch
from tiny import CHATML, SIZES
from tokenizers import pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
_WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())


def write_tiny_gguf(out: Path, seed: int = 0) -> Path:
    """Bytes are tokens 0..255, then <|im_start|> 256, <|im_end|> 257, ``aa`` 258, for there have to be merges, and one
    that nothing writes.

    It writes ASCII alone: llama.cpp keeps back bytes that are no UTF-8.
    """
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=False))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.15)
        other = [number for number, letter in enumerate(LETTERS) if not (letter.isascii() and letter.isprintable())]
        model.lm_head.weight[other] = 0.0
    writer = gguf.GGUFWriter(out, "llama")
    _write_facts(writer, model.config)
    for name, value in model.state_dict().items():
        module = name.removesuffix(".weight")
        array = value.numpy().astype(np.float32)
        if module in _WHOLE:
            writer.add_tensor(f"{_WHOLE[module]}.weight", array)
            continue
        layer, _, rest = module.removeprefix("model.layers.").partition(".")
        heads = {"self_attn.q_proj": 4, "self_attn.k_proj": 2}.get(rest)
        if heads:  # the two halves of every head in turns
            array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(f"blk.{layer}.{_NAMES[rest]}.weight", np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def _write_facts(writer: gguf.GGUFWriter, config: LlamaConfig) -> None:
    writer.add_name("tiny")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    tokens = [*LETTERS, "<|im_start|>", "<|im_end|>", "aa", "<|unused|>"]
    normal, control = gguf.TokenType.NORMAL, gguf.TokenType.CONTROL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([*[normal] * len(LETTERS), control, control, normal, control])
    writer.add_token_merges(["a a"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    writer.add_pad_token_id(257)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHATML)
