"""What stackctl's numbers are checked against: raw PEFT with every adapter live, in float64, and arithmetic by hand.

Float64 is not quite that where a model casts to float32 by itself, as the norms of Llama do.

Nothing here comes from stackctl. Text is tokenised by hand too: the tiny tokenizer has a token for each byte, and two
special ones.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, set_seed

torch.set_num_threads(1)  # models this small are slower on two

START, END = 256, 257
"""<|im_start|> and <|im_end|> of tests/tiny.py; the second is end of text, of turn, and padding."""
Member = tuple[Path, float]
Labelled = tuple[list[int], list[bool]]
"""Token ids, and which of them are supervised."""
Stamps = tuple[tuple[str, int, int], ...]
"""Name, size and time of each file of a folder."""

TOKENS = torch.arange(3, 35)[None] * 7 % 250
"""(1, 32) tokens to look at logits with."""


def load_plain(base: Path, dtype: torch.dtype = torch.float32) -> Any:
    """A model of its own by transformers, in float32 and then in ``dtype``."""
    return copy.deepcopy(_load(base, _stamps(base))).to(dtype)


def _stamps(folder: Path) -> Stamps:
    return tuple((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(folder.iterdir()))


@functools.lru_cache(maxsize=4)
def _load(base: Path, _: Stamps) -> Any:
    """Read once for as long as its files are the same; whoever asks gets a copy."""
    mixture = "experts" in (base / "config.json").read_text()  # whose fast path has no float64
    kind = {"experts_implementation": "eager"} if mixture else {}
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **kind).eval()


def live(base: Path, *members: Member, dtype: torch.dtype = torch.float64) -> Any:
    """Raw PEFT with all members active at once, each one's scaling multiplied by its weight."""
    model = load_plain(base)
    if not members:
        return model.to(dtype)
    names = [f"m{index}" for index in range(len(members))]
    model = PeftModel.from_pretrained(model, members[0][0], adapter_name=names[0])
    for name, (path, _) in zip(names[1:], members[1:], strict=True):
        model.load_adapter(path, adapter_name=name)
    activate(model, names, [weight for _, weight in members])
    return model.to(dtype).eval()


def activate(model: Any, names: list[str], weights: Sequence[float] | None = None) -> None:
    """Switch several adapters on at once; whole modules come from whoever brings them."""
    model.base_model.set_adapter(names)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for name, weight in zip(names, weights or [1.0] * len(names), strict=True):
                if name in module.scaling:
                    module.scaling[name] *= weight
        if isinstance(module, ModulesToSaveWrapper):
            module.set_adapter(next(name for name in names if name in module.modules_to_save))


def logits(model: Any, tokens: Tensor = TOKENS) -> Tensor:
    """(T, vocabulary) in float64."""
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits[0].double()


def base_logits(base: Path) -> Tensor:
    """Those of a base alone."""
    return _base_logits(base, _stamps(base)).clone()


@functools.lru_cache
def _base_logits(base: Path, _: Stamps) -> Tensor:
    return logits(live(base))


def relative(found: Tensor, wanted: Tensor, base: Tensor) -> float:
    """Largest error of ``found`` as a share of the largest effect that the stack has: max|f - w| / max|w - b|."""
    return float((found - wanted).abs().max() / (wanted - base).abs().max())


# -- data -------------------------------------------------------------------------------------------------------------


def write_jsonl(path: Path, records: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    return path


def label(record: dict[str, Any]) -> Labelled:
    """A text: all of it and an end; a conversation: what the assistant says, with its end of turn."""
    if "text" in record:
        ids = [*byte_ids(record["text"]), END]
        return ids, [True] * len(ids)
    ids, supervised = list[int](), list[bool]()
    for message in record["messages"]:
        head, said = [START, *byte_ids(message["role"] + "\n")], [*byte_ids(message["content"]), END]
        ids += [*head, *said, *byte_ids("\n")]
        supervised += [False] * len(head) + [message["role"] == "assistant"] * len(said) + [False]
    return ids, supervised


def byte_ids(text: str) -> list[int]:
    """Token ids of a text: the place of each byte's letter in the sorted byte-level alphabet."""
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = sorted(ByteLevel.alphabet())
    letters = ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    return [alphabet.index(letter) for piece, _ in letters for letter in piece]


def supervised_count(records: Sequence[dict[str, Any]]) -> int:
    return sum(sum(label(record)[1][1:]) for record in records)


def token_count(records: Sequence[dict[str, Any]]) -> int:
    """Tokens up to the last supervised one; what follows it changes no loss."""
    return sum(max(i for i, yes in enumerate(label(record)[1]) if yes) + 1 for record in records)


def loss_sum(model: Any, record: dict[str, Any]) -> Tensor:
    """Summed cross-entropy of a record's supervised tokens, the record alone in its row."""
    ids, supervised = label(record)
    out = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1]
    keep = torch.tensor(supervised[1:])
    return functional.cross_entropy(out[keep], torch.tensor(ids[1:])[keep], reduction="sum")


def loss(model: Any, records: Sequence[dict[str, Any]]) -> float:
    """Mean cross-entropy (nats) over all supervised tokens."""
    with torch.no_grad():
        return math.fsum(float(loss_sum(model, record)) for record in records) / supervised_count(records)


# -- training ---------------------------------------------------------------------------------------------------------


def adapter_digest(folder: Path) -> str:
    """A checkpoint's digest: of its configuration without what its base is called, and of its weights."""
    config = json.loads((folder / "adapter_config.json").read_text())
    del config["base_model_name_or_path"]
    weights = "sha256:" + hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()
    text = json.dumps({"config": config, "weights": weights}, sort_keys=True, ensure_ascii=False)
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def initial_seed(seed: int, members: Sequence[Member]) -> int:
    """What the new factors A are drawn with, by what docs/reference/registry.md says of ``initial_seed``."""
    if not members:
        return seed
    below = [[adapter_digest(Path(path)), float(weight)] for path, weight in members]
    return int(hashlib.sha256(json.dumps([seed, below], separators=(",", ":")).encode()).hexdigest()[:8], 16)


def train(
    base: Path,
    members: Sequence[Member],
    records: Sequence[dict[str, Any]],
    *,
    steps: int,
    learning_rate: float,
    rank: int = 4,
    alpha: float = 8,
    seed: int = 0,
    targets: Any = "all-linear",
    parameters: list[str] | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[dict[str, Tensor], list[float]]:
    """A plain loop: raw PEFT, all members live and frozen, every record in every step, AdamW at a constant rate.

    Gradients are clipped at norm 1, which is Trainer's default. Returns the factors by name, and each step's loss.
    """
    model = load_plain(base)
    set_seed(initial_seed(seed, members))
    config = LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=copy.copy(targets), target_parameters=parameters, task_type="CAUSAL_LM"
    )
    peft = get_peft_model(model, config, adapter_name="new")
    names = [f"m{index}" for index in range(len(members))]
    for name, (path, _) in zip(names, members, strict=True):
        peft.load_adapter(path, adapter_name=name)
    activate(peft, [*names, "new"], [*(weight for _, weight in members), 1.0])
    for name, parameter in peft.named_parameters():
        parameter.requires_grad_(".new." in name)
    for module in peft.modules():
        if isinstance(module, LoraLayer):
            for name in names:
                if name in module.lora_dropout:
                    module.lora_dropout[name] = torch.nn.Identity()
    peft.to(dtype).train()
    parameters = [parameter for parameter in peft.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    losses = []
    for _ in range(steps):
        total = torch.stack([loss_sum(peft, record) for record in records]).sum() / supervised_count(records)
        total.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(total.detach()))
    factors = {
        name.replace(".new.", "."): parameter.detach().double()
        for name, parameter in peft.named_parameters()
        if parameter.requires_grad
    }
    return factors, losses


def factors_of(checkpoint: Path) -> dict[str, Tensor]:
    """The tensors of a saved checkpoint, in float64."""
    return {name: tensor.double() for name, tensor in load_file(checkpoint / "adapter_model.safetensors").items()}


def distance(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """‖found - wanted‖ / ‖wanted‖ over all tensors of a kind (A, B) apart, the larger of the two."""
    assert set(found) == set(wanted)
    worst = 0.0
    for kind in ("lora_A", "lora_B"):
        names = [name for name in wanted if kind in name]
        gap = sum(float((found[name] - wanted[name]).square().sum()) for name in names)
        worst = max(worst, math.sqrt(gap / sum(float(wanted[name].square().sum()) for name in names)))
    return worst


# -- algebra ----------------------------------------------------------------------------------------------------------


def deltas(checkpoint: Path, weight: float = 1.0) -> dict[str, Tensor]:
    """weight · scaling · B @ A of every linear module, (out, in), in float64, straight from the file.

    For configurations without patterns.
    """
    config = json.loads((checkpoint / "adapter_config.json").read_text())
    assert not config["rank_pattern"] and not config["alpha_pattern"]
    scaling = config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"])
    tensors = factors_of(checkpoint)
    return {
        name.removesuffix(".lora_A.weight"): weight * scaling * tensors[name.replace("lora_A", "lora_B")] @ a
        for name, a in tensors.items()
        if name.endswith(".lora_A.weight")
    }


def added(*parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """The sum of deltas, module by module."""
    total: dict[str, Tensor] = {}
    for part in parts:
        for name, value in part.items():
            total[name] = total[name] + value if name in total else value
    return total


def exact_delta(members: Sequence[Member], module: str) -> Tensor:
    """Σ weight · scaling · B @ A of one linear module over several checkpoints, (out, in), in float64."""
    found = [deltas(path, weight) for path, weight in members]
    return torch.stack([by_name[name] for by_name in found for name in by_name if name.endswith(module)]).sum(0)
