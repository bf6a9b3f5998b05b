"""A registry with one tiny base, for the tests of the engine: adapters that raw PEFT wrote, and the real commands."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import random_adapter

from stackctl.engine.models import StackedModel, load_base
from stackctl.plan.stack_plan import StackPlan
from stackctl.registry.base_entries import resolve_base
from stackctl.registry.planning import read_plan
from stackctl.registry.resolve import resolve_expression
from stackctl.registry.store import Registry

CHAT: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]}
    for user, answer in (
        ("Hi.", "Well met, friend."),
        ("What is the sea?", "A great salt water, wide and cold."),
        ("Who?", "I."),
        ("海是什么？", "很大的水。"),
    )
] + [
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "One?"},
            {"role": "assistant", "content": "One it is."},
            {"role": "user", "content": "And two?"},
            {"role": "assistant", "content": "Two, too."},
        ]
    }
]
TEXTS: list[dict[str, Any]] = [
    {"text": "The sea was grey, and the gulls were loud."},
    {"text": "Night."},
    {"text": "Rain fell on the harbour, and nobody came."},
    {"text": "海面很静，没有风。"},
    {"text": "He walked along the shore until morning, counting the boats."},
]


def interrupt() -> None:
    """Ctrl-C, for ``at_step``."""
    raise KeyboardInterrupt


def disturb(checkpoint: Path) -> None:
    """Change whatever a checkpoint holds besides factors and copies of the base's weights."""
    file = checkpoint / "adapter_model.safetensors"
    tensors = load_file(file)
    own = [name for name in tensors if "lora_" not in name and not name.endswith(".base_layer.weight")]
    assert own
    save_file({n: t + 0.2 * torch.randn_like(t) if n in own else t for n, t in tensors.items()}, file, {"format": "pt"})


def registry_of(run: Any, base: Path, folder: Path) -> Path:
    """``folder/registry`` with ``base`` as ``tiny``, by the commands, or a copy of what they made of it before."""
    own, made = folder / "registry", base.with_name(f"{base.name}-registry")
    if made.exists() and not own.exists():
        return Path(shutil.copytree(made, own))
    new = not own.exists()
    run("init")
    run("base", "add", "tiny", base)
    if new and not base.is_relative_to(folder):
        shutil.copytree(own, made)
    return own


def made_once(folder: Path, kept: Path, make: Callable[[], None]) -> None:
    """Let ``make`` fill a working directory, or copy what it filled another with before; ``kept`` is of this session.

    Entries may name files of the first directory, which pytest leaves in place.
    """
    if kept.exists():
        shutil.copytree(kept, folder, dirs_exist_ok=True)
    else:
        make()
        shutil.copytree(folder, kept)


class TinyRegistry:
    """``run`` is the fixture of that name; everything lives in ``folder``, the working directory."""

    def __init__(self, run: Any, base: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.run, self.base, self.folder = run, base, folder
        self._monkeypatch = monkeypatch
        self.paths: dict[str, Path] = {}
        self._known: dict[Any, torch.Tensor] = {}
        self.registry = Registry(registry_of(run, base, folder))

    # -- adapters -------------------------------------------------------------------------------------------------

    def add(self, name: str, *, seed: int, scale: float = 0.1, **config: Any) -> Path:
        """Register an adapter with random factors, and with saved modules and biases that are not the base's."""
        path = random_adapter(self.base, self.folder / "made" / name, seed=seed, scale=scale, **config)
        if any(config.get(key) for key in ("modules_to_save", "bias", "trainable_token_indices")):
            disturb(path)
        self.run("add", name, path)
        self.paths[name] = path
        return path

    def add_on_every_kind(self, name: str) -> None:
        """``style`` on what a LoRA can stand on in that model (embedding, head, experts), and a plain ``instruct``."""
        odd = {"gpt2": ["c_attn", "wte", "lm_head"], "tied": ["q_proj", "lm_head"], "gemma": ["embed_tokens", "o_proj"]}
        experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        more = {"target_parameters": experts} if name == "mixtral" else {}
        self.add("style", seed=1, target_modules=odd.get(name, ["q_proj"]), **more)
        self.add("instruct", seed=2, r=3)

    def data(self, records: list[dict[str, Any]] = CHAT, name: str = "data.jsonl") -> Path:
        return oracle.write_jsonl(self.folder / name, records)

    def train(
        self, name: str, *options: object, on: str | None = None, records: list[dict[str, Any]] = CHAT, code: int = 0
    ) -> Any:
        """The JSON of a training on all records in every step, at a constant rate, unless ``options`` say otherwise."""
        given = ["--on", on] if on else []
        plain = {
            "--rank": 4, "--alpha": 8, "--batch-size": len(records), "--scheduler": "constant", "--warmup": 0,
            "--learning-rate": 0.003,
        }  # fmt: skip
        defaults = [part for key, value in plain.items() if key not in options for part in (key, value)]
        data = self.data(records)
        ran = self.run("train", name, *given, "--data", data, *defaults, *options, "--json", code=code)
        return ran.json

    def with_one(self) -> None:
        """Have ``one``, trained for a step in float32: once in a session on each base."""
        own, kept = self.folder / "registry", self.base.with_name(f"{self.base.name}-with-one")
        if kept.exists():
            shutil.copytree(kept, own, dirs_exist_ok=True)
        else:
            self.train("one", "--max-steps", 1, "--dtype", "float32")
            shutil.copytree(own, kept)

    def weights(self, name: str, version: int = 1) -> Path:
        return self.folder / "registry" / "weights" / name / str(version)

    def log(self, name: str) -> list[dict[str, Any]]:
        """The loss curve kept with an adapter."""
        return self.log_of(name, 1)

    def log_of(self, name: str, version: int) -> list[dict[str, Any]]:
        """The same of any version."""
        lines = (self.weights(name, version) / "training_log.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def adapters(self) -> set[str]:
        """What is registered, and nothing else may lie among the weights."""
        names = {adapter["name"] for adapter in self.run("ls", "--json").json["adapters"]}
        folders = self.folder / "registry" / "weights"
        on_disk = {path.name for path in folders.iterdir() if path.is_dir()} if folders.is_dir() else set()
        assert on_disk == names, "weights without an entry, or an entry without weights"
        return names

    def bytes_of(self, name: str) -> dict[str, str]:
        """The digest of each file of an adapter's checkpoint."""
        return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(self.weights(name).iterdir())}

    def at_step(self, step: int, act: Callable[[], None]) -> None:
        """Do something in the middle of a training, right after one of its steps."""
        self.at_steps({step: act})

    def at_steps(self, acts: Mapping[int, Callable[[], None]]) -> None:
        """The same after several steps."""

        @contextlib.contextmanager
        def progress(output: Any, name: str) -> Any:
            yield lambda done, steps, counters: acts.get(done, lambda: None)()

        self._monkeypatch.setattr("stackctl.cli.progress.training_progress", progress)

    # -- stacks ---------------------------------------------------------------------------------------------------

    def plan(self, expression: str) -> StackPlan:
        return read_plan(self.registry, resolve_expression(self.registry, expression))

    def load(self, dtype: str = "float32") -> StackedModel:
        return load_base(resolve_base(self.registry, "tiny"), self.registry, dtype=dtype)

    def logits(self, stacked: StackedModel, expression: str) -> torch.Tensor:
        stacked.use(self.plan(expression))
        return oracle.logits(stacked.model)

    def members(self, *members: tuple[str, float]) -> list[oracle.Member]:
        return [(self.paths[name], weight) for name, weight in members]

    def live(self, *members: tuple[str, float]) -> torch.Tensor:
        """Raw PEFT's logits with these members live; the base's without any."""
        if not members:
            return oracle.base_logits(self.base)
        if members not in self._known:
            self._known[members] = oracle.logits(oracle.live(self.base, *self.members(*members)))
        return self._known[members]

    def error(self, stacked: StackedModel, expression: str, *members: tuple[str, float]) -> float:
        """How far a stack's logits are from raw PEFT's, as a share of the stack's effect."""
        found = self.logits(stacked, expression)
        assert stacked.rounding_error < 1e-5, "float32 loses next to nothing"
        return oracle.relative(found, self.live(*members), self.live())
