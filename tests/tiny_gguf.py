"""A tiny Llama as the GGUF file, in float32, that llama.cpp's own converter would make of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gguf
import numpy as np
import torch
from tiny import CHATML, SIZES
from tokenizers import pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

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
    return write_gguf(out, "llama", model)


def write_gguf(
    out: Path,
    architecture: str,
    model: Any,
    facts: Mapping[str, float | int | str] = MappingProxyType({}),
    extra: Mapping[str, Sequence[float]] = MappingProxyType({}),
    left_out: Collection[str] = (),
    pre: str = "gpt-2",
) -> Path:
    """A model as llama.cpp's converter writes it; ``facts`` are more keys of its architecture, ``extra`` tensors."""
    writer = gguf.GGUFWriter(out, architecture)
    _write_facts(writer, model.config, pre)
    for key, value in facts.items():
        add = {float: writer.add_float32, int: writer.add_uint32, str: writer.add_string}[type(value)]
        add(f"{architecture}.{key}", value)
    known = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(known, model.config.num_hidden_layers)
    for name, value in model.state_dict().items():
        module, _, kind = name.rpartition(".")
        array = value.numpy().astype(np.float32)
        parts = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
        if architecture == "llama" and (own := parts.get(module.rpartition(".")[2])):  # halves of heads in turns
            heads = getattr(model.config, own)
            array = array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
        if isinstance(model.get_submodule(module), Conv1D):
            array = array.T
        if (called := f"{names.get_name(module)}.{kind}") not in left_out:
            writer.add_tensor(called, np.ascontiguousarray(array))
    for name, values in extra.items():
        writer.add_tensor(name, np.asarray(values, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def _write_facts(writer: gguf.GGUFWriter, config: Any, pre: str) -> None:
    writer.add_name("tiny")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    _write_words(writer, pre)
    if config.model_type == "gpt2":
        writer.add_feed_forward_length(config.n_inner or 4 * config.n_embd)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    if hasattr(config, "rms_norm_eps"):
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    else:
        writer.add_layer_norm_eps(getattr(config, "norm_epsilon", None) or config.layer_norm_eps)
    rope = config.rope_parameters
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_rope_dimension_count(int(head * rope.get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(rope["rope_theta"])


def _write_words(writer: gguf.GGUFWriter, pre: str) -> None:
    tokens = [*LETTERS, "<|im_start|>", "<|im_end|>", "aa", "<|unused|>"]
    normal, control = gguf.TokenType.NORMAL, gguf.TokenType.CONTROL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([*[normal] * len(LETTERS), control, control, normal, control])
    writer.add_token_merges(["a a"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    writer.add_pad_token_id(257)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHATML)
