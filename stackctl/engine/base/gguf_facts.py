"""What a GGUF file says beyond what transformers reads of it.

transformers (5.23) passes over what it has no name for, with no more than an INFO message: tensors, which it drops; a
weight that is missing, which it draws at random; and keys that change what a model computes. Here the configuration
gets what those keys say, and a file that says more is refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tokenizers import Regex, pre_tokenizers
from transformers import PreTrainedModel
from transformers.integrations.gguf.gguf_config_mapping import GGUF_CONFIG_ARCHS
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

from stackctl.core.errors import listed

_ROPE_FREQUENCIES = "rope_freqs.weight"
_EPSILONS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon")
_YARN = {f"rope.scaling.{name}" for name in (
    "attn_factor", "yarn_log_multiplier", "yarn_ext_factor", "yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow",
)}  # fmt: skip
"""What YaRN's angles may depend on besides, where it is not as usual."""
_AS_QWEN2 = {"stablelm2", "hunyuan", "solar-open"}
_BY_DIGITS = {"starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b"}
_AS_GPT2 = {
    "default", "gpt-2", "phi-2", "jina-es", "jina-de", "jina-v2-es", "jina-v2-de", "gigachat", "a.x-4.0", "mellum",
    "jina-v1-en", "jina-v2-code", "roberta-bpe", "mpt", "olmo", "jais", "trillion", "granite-docling", "exaone4",
    "modern-bert",
}  # fmt: skip
"""How byte-level vocabularies split text (``tokenizer.ggml.pre``), by what llama.cpp does (src/llama-vocab.cpp)."""
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""Of every Llama 3.1 to 3.3; a GGUF file has only what follows from them."""


def take_sizes(config: Any, file: Path) -> None:
    """Give a configuration the sizes that a file says, of which transformers takes those of the first models."""
    said = _said(gguf.GGUFReader(str(file)))
    head = said.get("attention.key_length")
    if head and hasattr(config, "head_dim") and not hasattr(config, "global_head_dim"):
        config.head_dim = head
    if config.model_type == "gpt2":
        config.n_positions, config.n_inner = said["context_length"], said["feed_forward_length"]


def _said(reader: gguf.GGUFReader) -> dict[str, Any]:
    """What a file says of its model, by the keys of its architecture."""
    own = f"{reader.fields['general.architecture'].contents()}."
    return {key.removeprefix(own): field.contents() for key, field in reader.fields.items() if key.startswith(own)}


def complete(model: PreTrainedModel, loading: dict[str, Any], file: Path) -> Iterator[str]:
    """Give a model's configuration what transformers passed over in its file; yields what it cannot be given.

    Args:
        loading: what ``from_pretrained`` says of the keys, ``output_loading_info``.
    """
    reader = gguf.GGUFReader(str(file))
    if missing := sorted(loading["missing_keys"]):
        yield f"it lacks {listed(missing)}"
    for name, own, wanted in loading["mismatched_keys"]:
        yield f"its {name} has the shape {list(own)}, and by what it says of its sizes {list(wanted)}"
    architecture = reader.fields["general.architecture"].contents()
    said = _said(reader)
    found = {tensor.name: tensor for tensor in reader.tensors}
    frequencies = found.pop(_ROPE_FREQUENCIES, None)
    if frequencies is not None and not _take_frequencies(model.config, frequencies.data):
        yield "its rotary frequencies (rope_freqs) are not those of Llama 3"
    factors = [found.pop(f"rope_factors_{which}.weight", None) for which in ("short", "long")]
    has_long = None not in factors and _take_long_rope(model.config, factors, said)
    if not has_long and any(factor is not None for factor in factors):
        yield "its rotary factors for long texts are not read from GGUF"
    if model.config.tie_word_embeddings:
        found.pop("output.weight", None)  # the embedding once more
    parameters = {id(parameter): parameter.numel() for parameter in model.parameters()}
    own = architecture in GGUF_CONFIG_ARCHS  # which transformers reads by rules of their own
    if not missing and not own and sum(int(tensor.n_elements) for tensor in found.values()) != sum(parameters.values()):
        known = get_gguf_hf_weights_map(model, TENSOR_PROCESSORS.get(architecture, TensorProcessor)())  # type: ignore[no-untyped-call]
        yield f"transformers reads nothing of {listed(sorted(found.keys() - known.keys()))}"
    yield from _take_rope(model.config, said, has_long)
    window = said.get("attention.sliding_window")
    if window and hasattr(model.config, "sliding_window") and not hasattr(model.config, "use_sliding_window"):
        model.config.sliding_window = window
    epsilon = said.get("attention.layer_norm_epsilon", said.get("attention.layer_norm_rms_epsilon"))
    for name in _EPSILONS:
        if epsilon and hasattr(model.config, name):
            setattr(model.config, name, epsilon)


def _take_rope(config: Any, said: dict[str, Any], has_long: bool) -> Iterator[str]:
    """The base of the rotary angles, how much of a head they turn, and by what they are scaled."""
    rope = getattr(config, "rope_parameters", None)
    if config.model_type == "gpt_oss" or not isinstance(rope, dict):
        return  # transformers reads it all, or there is none
    scaling, original = said.get("rope.scaling.type", "none"), said.get("rope.scaling.original_context_length")
    if scaling == "linear":
        scaled = rope.get("full_attention", rope)  # of Gemma 3 those of the layers that see everything
        scaled.update(rope_type="linear", factor=said.get("rope.scaling.factor", 1.0))
    elif scaling == "yarn" and original and "rope_theta" in rope and not _YARN & said.keys():
        rope.update(rope_type="yarn", factor=said["rope.scaling.factor"], original_max_position_embeddings=original)
    elif scaling != "none" and not has_long:
        yield f"its rotary angles are scaled ({scaling}) in a way that is not read from GGUF"
    if "rope_theta" not in rope:
        return
    rope["rope_theta"] = said.get("rope.freq_base", rope["rope_theta"])
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    turned = said.get("rope.dimension_count")
    if turned and turned != round(head * rope.get("partial_rotary_factor", 1.0)) and not hasattr(config, "rotary_dim"):
        rope["partial_rotary_factor"] = turned / head
        if hasattr(config, "partial_rotary_factor"):
            config.partial_rotary_factor = turned / head


def _take_frequencies(config: Any, factors: np.ndarray) -> bool:
    """Have the angles divided by some factors, (head / 2,), where those are the ones of Llama 3.

    They are made as llama.cpp's conversion/llama.py makes them.
    """
    rope = getattr(config, "rope_parameters", None)
    if not isinstance(rope, dict) or "rope_theta" not in rope:
        return False
    factor, low, high, length = float(factors.max()), *_LLAMA3.values()
    waves = 2 * math.pi * rope["rope_theta"] ** (np.arange(len(factors)) / len(factors))
    smooth = np.clip((length / waves - low) / (high - low), 0.0, 1.0)
    if not np.allclose(factors, 1 / ((1 - smooth) / factor + smooth), rtol=1e-4):
        return False
    rope.update(rope_type="llama3", factor=factor, **_LLAMA3)
    return True


def _take_long_rope(config: Any, factors: list[Any], said: dict[str, Any]) -> bool:
    """Have the angles of short and of long texts divided by factors of their own (Phi 3), where it is known which texts
    are long."""
    rope, original = getattr(config, "rope_parameters", None), said.get("rope.scaling.original_context_length")
    if not isinstance(rope, dict) or "rope_theta" not in rope or not original:
        return False
    short, long = (factor.data.tolist() for factor in factors)
    rope.update(
        rope_type="longrope", short_factor=short, long_factor=long, original_max_position_embeddings=original
    )  # fmt: skip
    if attention := said.get("rope.scaling.attn_factor"):
        rope["attention_factor"] = attention
    if hasattr(config, "original_max_position_embeddings"):
        config.original_max_position_embeddings = original
    return True


def take_splits(tokenizer: Any, file: Path) -> Iterator[str]:
    """Have a tokenizer split text as its vocabulary was learned, where transformers takes GPT-2's way for all that it
    does not know; yields what it cannot be given."""
    fields = gguf.GGUFReader(str(file)).fields
    pre = fields["tokenizer.ggml.pre"].contents() if "tokenizer.ggml.pre" in fields else "default"
    if fields["tokenizer.ggml.model"].contents() != "gpt2" or pre in GGUF_PRE_TOKENIZER_SPLITS.keys() | _AS_GPT2:
        return
    if pre not in _BY_DIGITS | _AS_QWEN2:
        yield f"how it splits text ({pre}) is not read from GGUF"
        return
    first: Any = pre_tokenizers.Digits(individual_digits=True)
    if pre in _AS_QWEN2:
        first = pre_tokenizers.Split(Regex(GGUF_PRE_TOKENIZER_SPLITS["qwen2"]), "isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre in _BY_DIGITS)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([first, bytes_])
