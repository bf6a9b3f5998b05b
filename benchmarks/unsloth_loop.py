"""Unsloth's CPU backend under TRL's SFTTrainer, on the same tokens. It runs by another Python, and needs no stackctl.

    UNSLOTH_PYTHON unsloth_loop.py BASE_FOLDER tokens.jsonl heldout.jsonl --layout padded

Weights and arithmetic are float32, as everyone else's, and activations are kept. On a CPU Unsloth turns TRL's packing
and its padding-free batches off, whatever is asked for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from trl_loop import main
from unsloth import FastLanguageModel  # before TRL, which it changes

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def load(base: Path, rank: int) -> tuple[Any, Any]:
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(base),
        max_seq_length=1024,
        dtype=torch.float32,
        load_in_4bit=False,
        use_gradient_checkpointing=False,
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=rank,
        lora_alpha=2 * rank,
        target_modules=LINEAR,
        use_gradient_checkpointing=False,
        random_state=0,
    )
    return model, tokenizer


if __name__ == "__main__":
    main(load)
