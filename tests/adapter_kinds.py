"""Adapters of PEFT's other kinds for the tiny Llama, by the configuration that makes one, and their files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import torch
from peft import PeftModel, get_peft_model
from tiny import save_adapter
from transformers import AutoModelForCausalLM

TARGETS = ["q_proj", "v_proj", "down_proj"]

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "ADALORA": ("AdaLoraConfig", {"init_r": 4, "target_r": 2, "total_step": 10}),
    "BOFT": ("BOFTConfig", {"boft_block_size": 4}),
    "C3A": ("C3AConfig", {"block_size": 8}),
    "DEFT": ("DeftConfig", {}),
    "DELORA": ("DeloraConfig", {}),
    "FOURIERFT": ("FourierFTConfig", {"n_frequency": 50, "init_weights": True}),
    "FROD": ("FrodConfig", {}),
    "GLORA": ("GloraConfig", {}),
    "GRALORA": ("GraloraConfig", {}),
    "HIRA": ("HiraConfig", {}),
    "HRA": ("HRAConfig", {}),
    "IA3": ("IA3Config", {"feedforward_modules": ["down_proj"]}),
    "LOHA": ("LoHaConfig", {"r": 2}),
    "LOKR": ("LoKrConfig", {}),
    "MISS": ("MissConfig", {"r": 4}),
    "MISS bat": ("MissConfig", {"r": 4, "init_weights": "bat"}),
    "OFT": ("OFTConfig", {"oft_block_size": 8, "r": 0}),
    "OSF": ("OSFConfig", {}),
    "PEANUT": ("PeanutConfig", {}),
    "PSOFT": ("PsoftConfig", {"r": 8}),
    "PVERA": ("PveraConfig", {}),
    "RANDLORA": ("RandLoraConfig", {"r": 4}),
    "ROAD": ("RoadConfig", {"group_size": 8}),
    "SHIRA": ("ShiraConfig", {"r": 2}),
    "SUPERTUNING": ("SupertuningConfig", {}),
    "TINYLORA": ("TinyLoraConfig", {}),
    "UNILORA": ("UniLoraConfig", {}),
    "VBLORA": ("VBLoRAConfig", {"vector_length": 8, "num_vectors": 8, "topk": 2}),
    "VERA": ("VeraConfig", {"r": 4}),
    "WAVEFT": ("WaveFTConfig", {"n_frequency": 50}),
    "DORA": ("LoraConfig", {"r": 4, "use_dora": True}),
    "QALORA": ("LoraConfig", {"r": 4, "use_qalora": True, "qalora_group_size": 8}),
    "KASA": ("LoraConfig", {"r": 4, "kasa_config": "KasaConfig"}),
    "PISSA": ("LoraConfig", {"r": 4, "init_lora_weights": "pissa"}),
    "OLORA": ("LoraConfig", {"r": 4, "init_lora_weights": "olora"}),
    "DORA pissa": ("LoraConfig", {"r": 4, "use_dora": True, "init_lora_weights": "pissa"}),
}
"""Kinds that can be made a plain LoRA, with PEFT's class of their configuration and its options."""
LOUD = {"RANDLORA": 0.002, "FOURIERFT": 0.02, "WAVEFT": 0.01}
"""Kinds that make far more of the same numbers, which would drown the base."""


def peft_config(kind: str, **more: Any) -> Any:
    name, options = KINDS[kind]
    found = getattr(peft, name, None) or getattr(peft.tuners, name)
    made = {key: getattr(peft.tuners.lora.config, v)() if key == "kasa_config" else v for key, v in options.items()}
    return found(**{"target_modules": TARGETS, "task_type": "CAUSAL_LM", **made, **more})


def make_adapter(model: Any, config: Any, out: Path, seed: int = 1, scale: float = 0.1) -> Any:
    """Attach an adapter by PEFT, change everything in it that trains, and save it. Returns the model, still live."""
    torch.manual_seed(seed)
    live = get_peft_model(model, config).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in live.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * scale)
    save_adapter(live, out)
    written = out / "adapter_config.json"
    settings = json.loads(written.read_text())
    if isinstance(settings.get("target_modules"), list):
        settings["target_modules"].sort()
    written.write_text(json.dumps(settings, indent=2, sort_keys=True))
    return live


def load_live(base: Path, path: Path) -> Any:
    """An adapter as PEFT itself loads it."""
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), path).eval()
