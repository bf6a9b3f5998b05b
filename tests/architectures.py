"""Every kind of causal language model that the installed transformers has, as a tiny random folder.

A configuration is made of the class's own defaults, with each size that has a known name made small. What a kind wants
besides stands in ``_BESIDES``.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from tiny import SIZES, tiny_tokenizer
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

VOCABULARY = SIZES["vocab_size"]
HIDDEN, HEADS, HEAD = 32, 4, 8

_SMALL: dict[str, Any] = {
    r"\w*vocab_size|vocab_size_per_layer_input": VOCABULARY,
    r"(text_|thinker_|backbone_|vision_|out_|encoder_|image_text_|attention_)?hidden_size": HIDDEN,
    r"(word_embed_|projector_)?(hidden_|proj_|input_|output_)?(embedding_)?(dim|size)|lru_width": HIDDEN,
    r"d_model|n_embd|embed_dim|emb_dim|projection_(dim|hidden_size|hidden_dim)|projector_hidden_size": HIDDEN,
    r"(dense_|shared_|expert_|decoder_)?intermediate_size(_mlp)?|(block_)?\w*ff(n)?_dim|dff|d_ff|d_inner|n_inner": 64,
    r"mlp_dim|dim_ff|(expert_)?ffn_hidden_size|feed_forward_size|moe_hidden_size": 64,
    r"moe_intermediate_size|\w*shared_experts?_intermediate_size|share_expert_dim": 16,
    r"(num_|n_|encoder_|decoder_)?(hidden_|encoder_|decoder_)?layers?|depth|num_layers_per_stack": 2,
    r"(swa_)?(num_|n_|conf_num_)?(encoder_|decoder_|sliding_)?(attention_)?heads?": HEADS,
    r"(swa_)?(num_)?(key_value|kv)_(n_)?heads|kv_n_heads|num_query_groups": 2,
    r"qk_head_dim": 2 * HEAD,
    r"\w*head_(dim|size)|d_head|dim_head|d_kv|kv_channels|resampler_dim_head": HEAD,
    r"linear_num_key_heads|linear_num_heads|index_n_heads": 2,
    r"linear_num_value_heads": 4,
    r"(original_)?max_position_embeddings|n_positions|n_ctx|context_length|max_seq_len|model_max_length": 512,
    r"max_(source|target)_positions": 512,
    r"(moe_)?num_(local_|routed_)?experts|n_routed_experts|zero_expert_num": 4,
    r"num_experts_per_tok(en)?|moe_k|moe_topk?|moe_top_k": 2,
    r"n_group|topk_group|num_expert_group|n_shared_experts|(moe_)?num_shared_experts": 1,
    r"first_k_dense_replace|num_dense_layers|(mamba_)?n_?groups|mamba_ngroups": 1,
    r"(kv|q|o)_lora_rank|gated_norm_rank|laurel_rank|adapter_rank|hc_lowrank": 8,
    r"(mamba_d_|ssm_)?state(_size)?|mamba_n_heads|mamba_num_heads|n_mamba_heads": 8,
    r"mamba_d_head|mamba_headdim|time_step_rank|mamba_dt_rank": 8,
    r"mamba_d_ssm|index_topk": 64,
    r"rotary_dim": 4,
    r"(sliding_|attention_|keep_)?window(_size)?|local_attention|(mamba_|attention_)?chunk_size|block_size": 16,
    r"image_size": 28,
    r"patch_size": 14,
    r"hidden_size_per_layer_input": 8,
    r"num_kv_shared_layers|num_nextn_predict_layers": 0,
    r"bos_token_id": SIZES["bos_token_id"],
    r"eos_token_id|decoder_start_token_id": SIZES["eos_token_id"],
    r"forced_eos_token_id": None,
    r"\w*p?drop(out|_path)?(_p|_prob|_rate)?|(\w+_)?layerdrop": 0.0,
    r"num_query_tokens|latent_query_num|image_seq_length|mm_tokens_per_image": 4,
}
_RULES = [(re.compile(pattern), value) for pattern, value in _SMALL.items()]
"""Patterns of the names of sizes, and what those shall be."""

_SPECIAL = re.compile(
    r"(image|video|audio|vision|boi|eoi|boa|eoa|eod|sep|mask|frame|im|img|assistant|user|cls|unk|tts|codec)_.*(id|index)"
)
"""Names of token ids that stand for something that is no text; they get bytes that no text here has."""


def model_types() -> list[str]:
    """Every model type of the causal mapping, then those of the conditional classes that take text alone."""
    causal = dict(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    conditional = {**modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}
    return [*sorted(causal), *sorted(set(conditional) - set(causal))]


def tiny_config(model_type: str) -> PreTrainedConfig:
    """The configuration of a model type, made small."""
    kind = CONFIG_MAPPING[model_type]
    besides = _BESIDES.get(model_type, {})
    return kind(**_merge(_small(kind, besides), besides))


def _merge(small: dict[str, Any], besides: dict[str, Any]) -> dict[str, Any]:
    for key, value in besides.items():
        if isinstance(value, dict) and isinstance(small.get(key), dict) and key.endswith("config"):
            small[key] = _merge(dict(small[key]), value)
        elif value is DROP:
            small.pop(key, None)
        else:
            small[key] = value
    return small


DROP = object()


def _small(kind: type[PreTrainedConfig], besides: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a configuration class, each known size small."""
    try:
        defaults = vars(kind())
    except Exception:  # some have none; what they are given stands in _BESIDES
        defaults = {}
    small: dict[str, Any] = {}
    for name, value in defaults.items():
        if isinstance(value, PreTrainedConfig):
            small[name] = _sub(value)
        else:
            _shrink(small, name, value)
    _fit(small, defaults, besides)
    if "kv_lora_rank" in small and "num_key_value_heads" in small:  # latent attention: a key for each head
        small["num_key_value_heads"] = HEADS
    return small


def _sub(config: PreTrainedConfig) -> dict[str, Any]:
    part = _small(type(config), {})
    if config.model_type:
        part["model_type"] = config.model_type
    return part


def _shrink(small: dict[str, Any], name: str, value: Any) -> None:
    if name.startswith("_") or isinstance(value, bool):
        return
    if isinstance(value, int | float) or value is None or (name == "eos_token_id" and isinstance(value, list)):
        for pattern, size in _RULES:
            if pattern.fullmatch(name):
                if value is not None or name in ("head_dim",):
                    small[name] = size
                return
        if _SPECIAL.fullmatch(name) and isinstance(value, int) and value >= VOCABULARY:
            small[name] = 200 + sum(map(ord, name)) % 50
        if name == "pad_token_id":
            small[name] = SIZES["pad_token_id"] if value is None or value >= VOCABULARY else value


def _fit(small: dict[str, Any], defaults: dict[str, Any], besides: dict[str, Any]) -> None:
    """Lists with an entry for each layer: one layer of each kind, and two at least."""
    layers = int(besides.get("num_hidden_layers") or small.get("num_hidden_layers") or 2)
    lists = ("layer_types", "mlp_layer_types", "layers_block_type")
    given = {key: list(defaults[key]) for key in lists if isinstance(defaults.get(key), list | tuple) and defaults[key]}
    if given:
        rows = list(dict.fromkeys(zip(*given.values(), strict=False)))
        while len(rows) < layers:
            rows.append(rows[-1])
        small["num_hidden_layers"] = len(rows)
        for key, column in zip(given, zip(*rows, strict=True), strict=True):
            small[key] = list(column)
    for key, value in defaults.items():
        if key in given or key in small or not isinstance(value, list | tuple):
            continue
        if len(value) == defaults.get("num_hidden_layers") and len(value) > 2:
            small[key] = type(value)(value[: small.get("num_hidden_layers", 2)])


_MROPE = {
    "text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}
}
_MROPE_HALF = {
    "text_config": {
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 0, 1], "partial_rotary_factor": 0.5,
        }
    }
}  # fmt: skip
_COMPASS: dict[str, Any] = {
    "layer_types": ["sliding_attention", "full_attention"],
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
        "full_attention": None,
    },
}
_DOTS3: dict[str, Any] = {
    "num_key_value_heads": 4, "num_hidden_layers": 2, "layer_types": ["indexed_attention", "sliding_attention"],
    "mlp_layer_types": ["dense", "sparse"],
    "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 8, "swa_kv_lora_rank": 8,
    "swa_head_dim": 16, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8, "head_dim": 16,
}  # fmt: skip
_QWEN4: dict[str, Any] = {
    "ple_embed_dim": 32, "heads_per_ngram": 2, "split_ngram_parts": 2, "ngram_vocab_size_base": 50,
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 64,
    "indexer_compress_ratio": 4,
}  # fmt: skip
_SMALL_VQ: dict[str, Any] = {"vq_config": {"base_channels": 32, "channel_multiplier": [1, 1], "num_embeddings": 64}}
_BESIDES: dict[str, dict[str, Any]] = {
    "hy_v4_vl": {
        "text_config": {
            "num_key_value_heads": 4,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
        }
    },
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "bamba": {"attn_layer_indices": [1]},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "xlstm": {"hidden_size": 64, "embedding_dim": 64, "num_heads": 4, "num_blocks": 2, "qk_dim_factor": 1.0},
    "deepseek_ocr2": {
        "text_config": {
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "mlp_layer_types": ["dense", "sparse"],
        }
    },
    "glm5_next": {"text_config": {"num_key_value_heads": 4, "qk_rope_head_dim": 0}},
    "emu3": {
        "vq_config": {"base_channels": 32},
        "vocabulary_map": {"<|extra_200|>": 3, "<|image token|>": 4, "<image>": 250},
    },
    "blt": {"encoder_hash_byte_group_vocab": 100},
    "cohere_compass_text": _COMPASS,
    "cohere_compass": {"text_config": _COMPASS},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "dory": {
        "num_hidden_layers": 3,
        "n_input_layers": 1,
        "n_recurrent_layers": 1,
        "n_output_layers": 1,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_text": _DOTS3,
    "dots3_note": {
        "text_config": _DOTS3,
        "vision_config": {"adapter_in_dim": 32, "adapter_out_dim": 32, "adapter_merge_size": 2},
        "audio_config": {"adapter_input_size": 32, "adapter_output_size": 32},
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "attention_layers": ["global", "local"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "mpt": {"attn_config": DROP},
    "nemotron": {"num_key_value_heads": 2},
    "reformer": {
        "is_decoder": True,
        "axial_pos_shape": [16, 32],
        "axial_pos_embds_dim": [16, 16],
        "attn_layers": ["local", "lsh"],
        "num_buckets": 4,
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "num_key_value_heads": 4,
        "n_mamba_heads": 2,
    },
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "num_mem_blocks": 1,
        "num_key_value_heads": 4,
        "attention_head_dim": DROP,
        "attention_hidden_size": DROP,
        "mamba_headdim": DROP,
    },
    "llama4": {"vision_config": {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32}},
    "zaya": {"num_experts_per_tok": 1, "num_experts_per_token": 1},
    "glm46v": _MROPE,
    "glm4v": _MROPE,
    "glm_ocr": _MROPE,
    "glmga": _MROPE,
    "glm4v_moe": _MROPE_HALF,
    "paddleocr_vl": _MROPE,
    "qwen2_5_vl": _MROPE,
    "qwen2_vl": _MROPE,
    "qwen2_5_omni_thinker": _MROPE,
    "cosmos3_edge": _MROPE,
    "step3p7": {"text_config": {"sliding_window": 16}},
    "qwen4_exp_text": _QWEN4,
    "qwen4_exp": {"text_config": _QWEN4},
    "longcat_flash": {"num_layers": 2},
    "mistral4": {"head_dim": 16},
    "granite4_vision": {"deepstack_layer_map": [[0, 0]], "spatial_target_layers": [0]},
    "janus": _SMALL_VQ,
    "chameleon": {**_SMALL_VQ, "vocabulary_map": {"<image>": 250, "IMGIMGAZ": 1}},
    "hunyuan_vl": {
        "text_config": {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [1, 1, 1, 1],
            }
        }
    },
}
"""What a kind wants beside small sizes."""


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class that a folder with this configuration is of: where there is a conditional one, that."""
    for mapping in (modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING):
        if type(config) in mapping:
            found = mapping[type(config)]
            return found[0] if isinstance(found, tuple) else found
    raise KeyError(type(config).__name__)


def tiny_model(model_type: str, *, seed: int = 0, deviation: float = 0.15, **besides: Any) -> PreTrainedModel:
    """A model of that type in float32, with weights livelier than the usual ones, so that differences show.

    ``besides`` are settings of its configuration.
    """
    config = tiny_config(model_type)
    for key, value in besides.items():
        setattr(config, key, value)
    torch.manual_seed(seed)
    model = model_class(config)(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "A_log" not in name:
                parameter.normal_(0, deviation)
    return model


def tiny_folder(model_type: str, folder: Path, **besides: Any) -> Path:
    """Write such a model and the tiny tokenizer to a folder."""
    model = tiny_model(model_type, **besides)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
