"""What a new adapter stands on: chosen, said, and held against what PEFT attaches and would read back.

PEFT attaches other things than it is asked for in many models: it takes names like ``gate_proj`` for experts and turns
them into parameters, matches a short name wherever it ends another, and forbids some layers. So the choice is made by
full names, tried on the model without its weights, and compared, before anything is loaded.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import TrainableTokensWrapper
from torch import nn
from transformers import PreTrainedModel

from stackctl.core import Say
from stackctl.core.errors import Incompatible, first_line, listed
from stackctl.core.schema import Base, ModuleShape
from stackctl.core.train_job import TrainJob
from stackctl.engine.base.model_class import empty_model
from stackctl.engine.base.module_shapes import computes, is_called, text_modules
from stackctl.engine.live_adapter import FOLD_HINT, FOUR_BITS_HINT, check_live
from stackctl.engine.peft_limits import is_forbidden, not_read_back
from stackctl.engine.training.adapter import ADAPTER, new_layers
from stackctl.engine.training.trained_tokens import token_settings, tokens_of
from stackctl.jobs.job import PreparedJob
from stackctl.lora.target_modules import ALL_LINEAR, expand_modules, named_targets, natural_order, parse_targets
from stackctl.lora.target_parameters import EXPERTS, is_parameter_only, parameter_of, shortest_suffixes
from stackctl.plan.token_rows import KEY

_SHOWN = 12
_UNREAD = "PEFT does not find its tensors again when it loads them"
_FOUND: dict[tuple[Any, ...], Targets] = {}
"""By all that it depends on: a recipe trains several adapters, mostly on the same layers of the same base."""


@dataclass(frozen=True)
class Targets:
    """What an adapter stands on, by full names; what LoraConfig takes for it; and what has none, with why."""

    modules: frozenset[str]
    settings: dict[str, Any]
    left_out: dict[str, str]
    tokens: dict[int, str] = field(default_factory=dict)
    """Single tokens whose rows are trained besides, by number."""
    checkpoints: bool = True
    """Whether the model can compute activations again instead of keeping them."""

    def __str__(self) -> str:
        text = f"adapts {_listed(self.modules)}"
        if self.tokens:
            told = listed([f"{token} ({number})" for number, token in sorted(self.tokens.items())], _SHOWN)
            text += f"; trains the rows of {told} in {_listed(self.settings[KEY])}"
        reasons: dict[str, list[str]] = {}
        for name, why in self.left_out.items():
            reasons.setdefault(why, []).append(name)
        if reasons:
            text += "; leaves out " + "; ".join(f"{_listed(names)} ({why})" for why, names in reasons.items())
        return text


def _listed(names: Collection[str]) -> str:
    """The last parts of names, of a number in a list with its parent."""
    return listed(sorted({_short(name) for name in names}), _SHOWN)


def _short(name: str) -> str:
    *_, parent, last = ["", *name.split(".")]
    return f"{parent}.{last}" if last.isdigit() or parent == "experts" else last


def targets_of(prepared: PreparedJob, folder: Path, tokenizer: Any, say: Say = lambda _: None) -> Targets:
    """What a prepared job's adapter stands on, by the model in ``folder``; see :func:`choose_targets`.

    Raises:
        Incompatible: the model cannot be trained on, PEFT cannot do what was asked for, or the frozen stack cannot be
            kept live beside it and has to.
        Usage: a token to train is none.
    """
    tokens = tokens_of(prepared, tokenizer, say)
    job, model = prepared.job, (msgspec.json.encode(prepared.base), (folder / "config.json").read_bytes())
    known = (*model, str(job.target_modules), job.effective_rank(), job.dropout, job.gradient_checkpointing, *tokens)
    if known not in _FOUND:
        _FOUND[known] = _find(prepared, folder, tokens)
    targets = replace(_FOUND[known], tokens=tokens)
    if prepared.stays_live:
        hint = FOUR_BITS_HINT if job.dtype == "nf4" else FOLD_HINT
        check_live(prepared.plan, targets.settings.get("target_parameters"), hint)
    begins = prepared.beginning
    if begins and (odd := sorted(targets.modules ^ set(begins.plan.modules), key=natural_order)):
        raise Incompatible(
            f"--from {begins.label}: on '{prepared.base.name}' PEFT would not adapt the same modules: {odd[0]}",
            hint="train it from nothing: leave out --from",
        )
    return targets


def _find(prepared: PreparedJob, folder: Path, tokens: Collection[int]) -> Targets:
    model = empty_model(folder)
    if model.config.model_type == "reformer" and model.config.axial_pos_embds:
        length = math.prod(model.config.axial_pos_shape)
        raise Incompatible(
            f"'{prepared.base.name}' cannot be trained on here: its positions are for rows of exactly {length} tokens "
            "while it trains",
            hint="choose another base",
        )
    if prepared.job.gradient_checkpointing and not model.supports_gradient_checkpointing:
        raise Incompatible(
            f"--gradient-checkpointing: transformers has none for a {type(model).__name__}",
            hint="leave it out; a smaller --batch-size needs less memory, too",
        )
    rows = token_settings(prepared, tokens, model)
    found = choose_targets(model, prepared.base, prepared.job, text_modules(model), rows)
    return replace(found, checkpoints=bool(model.supports_gradient_checkpointing))


def choose_targets(
    model: PreTrainedModel, base: Base, job: TrainJob, text: Collection[str], rows: dict[str, Any] | None = None
) -> Targets:
    """What a job's adapter stands on. ``model`` has no weights (meta device), and is of no further use.

    ``text`` are the names of modules that text goes through; ``rows`` is what LoraConfig takes for rows of single
    tokens. By default that is every linear layer that PEFT can adapt and read back, but the output embedding, and every
    expert.

    Raises:
        Incompatible: PEFT cannot attach what was asked for, by name, or would not read it back.
    """
    known = expand_modules(base.modules)
    asked = parse_targets(job.target_modules)
    left_out: dict[str, str] = {}
    if asked == ALL_LINEAR:
        chosen, left_out = _default(model, known, base, job, text)
    else:
        chosen = named_targets(asked, base)
    every = {name for name, _ in model.named_modules()}
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    typed = asked
    for _ in range(3):
        settings = _settings(chosen, known, base, typed, every, parameters) | (rows or {})
        lost = _try(model, base, job, settings, chosen)
        if not lost:
            return Targets(frozenset(chosen), settings, left_out)
        if typed != ALL_LINEAR:  # in mixtures PEFT makes last names of a regular expression, which are in every layer
            typed = ALL_LINEAR
            continue
        if asked != ALL_LINEAR:
            break
        left_out |= lost
        if chosen <= lost.keys():
            break
        chosen -= lost.keys()
    if asked == ALL_LINEAR:
        raise Incompatible(
            f"PEFT can adapt no linear layer of '{base.name}', a {base.architecture}: {next(iter(lost.values()))}",
            hint="choose another base",
        )
    name, why = sorted(lost.items(), key=lambda item: natural_order(item[0]))[0]
    raise Incompatible(
        f"target_modules: {name} of '{base.name}' cannot be adapted: {why}",
        hint="leave out --target-modules for all that can be, or name others",
    )


def _default(
    model: PreTrainedModel, known: dict[str, ModuleShape], base: Base, job: TrainJob, text: Collection[str]
) -> tuple[set[str], dict[str, str]]:
    """The layers that an adapter stands on if nothing is said, and those that it leaves out, with why."""
    chosen, left_out = set[str](), dict[str, str]()
    for name, shape in known.items():
        holder = name.rpartition(".")[0] if shape.type in EXPERTS else name
        if shape.type == "Embedding" or name == base.output_embedding or holder not in text:
            continue
        if shape.type == "Shared":
            left_out[name] = "several layers share it"
        elif shape.type not in ("Linear", "Conv1D", *EXPERTS):
            left_out[name] = "no plain linear layer"
        elif is_forbidden(model, name):
            left_out[name] = f"PEFT forbids it in {model.config.model_type}"
        elif job.dropout and is_parameter_only(name, shape.type, base.converted_names):
            left_out[name] = "PEFT adapts it without dropout only"
        else:
            chosen.add(name)
    return chosen, left_out


def _settings(
    chosen: set[str],
    known: dict[str, ModuleShape],
    base: Base,
    typed: list[str] | str,
    every: set[str],
    parameters: set[str],
) -> dict[str, Any]:
    """What LoraConfig takes to choose just these: what was ``typed``, or for all-linear the shortest names that do."""
    as_parameters = {name for name in chosen if is_parameter_only(name, known[name].type, base.converted_names)}
    as_modules = chosen - as_parameters
    settings: dict[str, Any] = {
        "target_modules": shortest_suffixes(as_modules, every) or None,
        "fan_in_fan_out": any(known[name].type == "Conv1D" for name in chosen),
    }
    if not as_parameters and typed != ALL_LINEAR:
        settings["target_modules"] = typed
    if as_parameters:
        names = {parameter_of(name, known[name]) for name in as_parameters}
        settings["target_parameters"] = shortest_suffixes(names, parameters)
    return settings


def _try(
    model: PreTrainedModel, base: Base, job: TrainJob, settings: dict[str, Any], chosen: set[str]
) -> dict[str, str]:
    """What PEFT does not attach of what was chosen, or attaches besides, or would not read back; with why."""
    uncalled = [name for name in chosen if not is_called(model, name)]
    computing = [name for name, module in model.named_modules() if name in chosen and computes(module)]
    config = LoraConfig(r=job.effective_rank(), lora_dropout=job.dropout, task_type="CAUSAL_LM", **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            peft = get_peft_model(model, config, adapter_name=ADAPTER, low_cpu_mem_usage=True)
        except (ValueError, TypeError, AttributeError) as error:
            raise Incompatible(
                f"PEFT cannot adapt this model ({first_line(error)[:300]})", hint="name other layers: --target-modules"
            ) from error
        try:
            found = {name for name, _ in new_layers(peft)}
            check_rows(peft, base, settings)
            lost = dict.fromkeys(chosen - found, "PEFT attaches nothing there")
            lost |= dict.fromkeys(found - chosen, "PEFT attaches it unasked")
            lost |= dict.fromkeys(uncalled, "the model reads its weight without calling it")
            lost |= dict.fromkeys(computing, "it does more than look up a row, and no stack could hold a change of it")
            return lost or dict.fromkeys(not_read_back(peft, ADAPTER, chosen), _UNREAD)
        finally:
            peft.unload()


def check_rows(model: PeftModel, base: Base, settings: dict[str, Any]) -> None:
    """Hold the modules of which PEFT trains single rows against those that it was asked for, and the head tied to one.

    Raises:
        Incompatible: they are others.
    """
    wanted = set(settings.get(KEY) or ())
    if base.ties_rows and base.input_embedding in wanted:
        wanted |= {base.output_embedding} - {None}
    inner: nn.Module = model.get_base_model()
    named = inner.named_modules(remove_duplicate=False)
    found = {name for name, module in named if isinstance(module, TrainableTokensWrapper)}
    if odd := sorted(found ^ wanted):
        raise Incompatible(
            f"PEFT would not train the rows of '{base.name}' that it was asked for: {', '.join(odd[:3])}",
            hint="leave out --train-tokens",
        )
