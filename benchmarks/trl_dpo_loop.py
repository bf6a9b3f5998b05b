"""TRL's DPOTrainer on pairs of answers. Prints what it measured. It runs by another Python, and needs no stackctl.

    TRL_PYTHON trl_dpo_loop.py MERGED_FOLDER pairs.jsonl

The stack is merged by hand into the folder, as TRL asks for; its reference is then that model with the adapter off.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("base", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    asked = parser.parse_args()
    records = [json.loads(line) for line in asked.data.read_text().splitlines()]
    model = AutoModelForCausalLM.from_pretrained(asked.base, dtype=torch.float32)
    lora = LoraConfig(r=asked.rank, lora_alpha=2 * asked.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    with tempfile.TemporaryDirectory() as folder:
        arguments = DPOConfig(
            output_dir=folder, per_device_train_batch_size=asked.batch_size, num_train_epochs=asked.epochs,
            learning_rate=asked.learning_rate, lr_scheduler_type="constant", beta=0.1, bf16=False, use_cpu=True,
            gradient_checkpointing=False, logging_steps=1, report_to="none", save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        trainer = DPOTrainer(
            model=model, args=arguments, train_dataset=Dataset.from_list(records), peft_config=lora,
            processing_class=AutoTokenizer.from_pretrained(asked.base),
        )  # fmt: skip
        trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    losses = [step["loss"] for step in steps]
    print(json.dumps({"first": losses[0], "loss": sum(losses) / len(losses), "tokens": steps[-1]["num_tokens"]}))


if __name__ == "__main__":
    main()
