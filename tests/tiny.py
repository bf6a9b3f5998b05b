"""Tiny random models of several architectures, with a byte-level tokenizer and a chat template."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VOCABULARY = 260
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 257,
}
"""What the configurations of small models have in common."""


def _config(name: str) -> Any:
    sizes = dict(SIZES)
    if name == "gpt2":
        return GPT2Config(
            vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=512, bos_token_id=256,
            eos_token_id=257, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )  # fmt: skip
    if name == "neox":
        del sizes["num_key_value_heads"]
        return GPTNeoXConfig(**sizes)
    if name == "mixtral":
        return MixtralConfig(**sizes, num_local_experts=4, num_experts_per_tok=2)
    if name == "gemma":
        return GemmaConfig(**sizes, head_dim=8, tie_word_embeddings=True)
    if name == "qwen3":
        return Qwen3Config(**sizes, head_dim=8)
    kinds = {
        "llama": LlamaConfig,
        "tied": LlamaConfig,
        "mistral": MistralConfig,
        "qwen2": Qwen2Config,
        "phi3": Phi3Config,
    }
    return kinds[name](**sizes, tie_word_embeddings=name == "tied")


def long_rope(original: int) -> Phi3Config:
    """A tiny Phi 3 whose positions are turned by other angles in texts of more than ``original`` tokens."""
    angles = {"short_factor": [1.0] * 4, "long_factor": [1.0, 3.0, 9.0, 27.0], "rope_theta": 10_000.0}
    rope = {"rope_type": "longrope", "original_max_position_embeddings": original, **angles}
    return Phi3Config(**SIZES, original_max_position_embeddings=original, rope_parameters=rope)


def made_of(config: Any) -> Any:
    """The model of a configuration, with weights that matter."""
    torch.manual_seed(0)
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](copy.deepcopy(config))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return model


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes are tokens 0..255, then <|im_start|> 256, <|im_end|> 257 (end of text, of turn, and padding)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE({char: index for index, char in enumerate(alphabet)}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    tokenizer.chat_template = CHATML
    return tokenizer


class TinyModels:
    """Model folders, each made once in a session."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def __call__(self, name: str, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
        """The folder of ``llama``, ``tied`` (Llama with tied embeddings), ``gpt2``, ``qwen2``, ``qwen3``, ``mistral``,
        ``gemma``, ``phi3``, ``neox`` or ``mixtral``; another seed is another model.
        """
        folder = self._root / f"{name}-{seed}-{str(dtype).removeprefix('torch.')}"
        if not folder.exists():
            torch.manual_seed(seed)
            config = _config(name)
            model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
            with torch.no_grad():  # livelier than the usual initialisation, so that differences show
                for parameter in model.parameters():
                    if parameter.ndim > 1:
                        parameter.normal_(0, 0.15)
            model.to(dtype).save_pretrained(folder)
            tiny_tokenizer().save_pretrained(folder)
        return folder


_MADE: dict[str, tuple[dict[str, bytes], torch.Tensor]] = {}
"""The files of each adapter made so far, by the base's files and all that was asked for, and the generator's state."""


def random_adapter(base: Path, out: Path, *, seed: int = 0, scale: float = 0.3, **config: Any) -> Path:
    """A PEFT checkpoint with random, non-zero factors, written by PEFT itself at ``out``'s root."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **config}
    stamps = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(base.iterdir())]
    try:
        key = json.dumps([str(base), stamps, seed, scale, settings])
    except TypeError:  # an object of PEFT's
        key = ""
    if key not in _MADE:
        _write_random_adapter(base, out, settings, seed, scale)
        made = {path.name: path.read_bytes() for path in out.iterdir()}, torch.get_rng_state()
        if not key:
            return out
        _MADE[key] = made
    files, state = _MADE[key]
    torch.set_rng_state(state)
    out.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (out / name).write_bytes(data)
    return out


def save_adapter(model: Any, out: Path, **options: Any) -> None:
    """PEFT's own ``save_pretrained`` into a folder with a card: where there is none, its template is compiled anew."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "README.md").write_text("---\nlibrary_name: peft\n---\n")
    model.save_pretrained(out, **options)


def _write_random_adapter(base: Path, out: Path, settings: dict[str, Any], seed: int, scale: float) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, scale)
    save_adapter(model, out)
    file = out / "adapter_config.json"
    written = json.loads(file.read_text())
    for key in ("target_modules", "target_parameters"):  # sets inside PEFT, in another order in each process; and so
        if isinstance(written.get(key), list):  # would be the digest, and the seed of what is trained on top of it
            written[key].sort()
    file.write_text(json.dumps(written, indent=2, sort_keys=True))


def untrained_base(folder: Path, *, learned: bool) -> Path:
    """A tiny base whose ordinary rows were trained, with room behind its tokenizer's last token."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=288, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=256, eos_token_id=257, pad_token_id=257, tie_word_embeddings=True,
    ))  # fmt: skip
    with torch.no_grad():
        weight = model.get_input_embeddings().weight
        weight.normal_(0, 0.02)
        weight[: 258 if learned else 256] += torch.randn(258 if learned else 256, 64) * 0.2
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
