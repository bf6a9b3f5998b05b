"""A plain LoRA out of another kind of adapter, by what PEFT itself makes of it.

PEFT merges an adapter into the weight of each layer; what that changes is a delta, whatever made it, and the best pair
of factors for it is a LoRA. Each layer is merged in float64, beside the model, and held against what the layer computes
with the adapter live. A LoRA that took a product of factors out of its base when it began (PiSSA, OLoRA) is the
difference of two products, so twice its rank holds all of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from stackctl.core.errors import Incompatible, VerificationFailed, first_line, listed
from stackctl.core.schema import Base
from stackctl.engine import algebra
from stackctl.engine.base.model_class import empty_model
from stackctl.engine.base.module_shapes import is_called
from stackctl.engine.loss.logits import difference, probe
from stackctl.engine.models import StackedModel
from stackctl.engine.tensors import MemberTensors, all_finite
from stackctl.engine.to_lora.low_rank import LowRankPairs, Truncation
from stackctl.engine.to_lora.merged_layers import ADAPTER, PEFT_ERRORS, Kept, merged_layer, tuner_layers
from stackctl.engine.to_lora.taken_out import Begun, sharing_weights
from stackctl.lora.checkpoint import Checkpoint
from stackctl.lora.target_modules import expand_modules, expected_targets, natural_order
from stackctl.plan.stack_plan import StackPlan

_OUTPUT_TOLERANCE = 1e-3
"""How far the logits may be from the live adapter's once all layers are merged, as a share of what it changes."""
_TOKENS = 32
_COPIED = (".base_layer.weight", ".lora_magnitude_vector.weight")
"""What PEFT writes beside an adapter on an embedding once more: the embedding itself, and the magnitudes of a DoRA."""
_SAME = 1e-4
"""How far a sum of factors may be from the change of a weight and still be it: a large weight rounds it in float32."""


@dataclass(frozen=True)
class Original:
    """What an adapter does: the logits for tokens with it live, and without it."""

    tokens: Tensor
    live: Tensor
    without: Tensor

    def error(self, now: Tensor) -> float:
        """How far other logits are from the live adapter's, as a share of what that changes in them."""
        return difference(now, self.live) / max(difference(self.without, self.live), 1e-30)


def device() -> str:
    """Where to convert: a GPU of NVIDIA's, else the CPU; others have no float64."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_header(checkpoint: Checkpoint, folder: Path) -> None:
    """Hold a checkpoint's configuration and header against the base without any weight, as PEFT would attach it.

    Raises:
        Incompatible: with everything that does not fit.
    """
    config = _config(checkpoint)
    try:
        model = get_peft_model(empty_model(folder), config, low_cpu_mem_usage=True)
    except NotImplementedError:  # two kinds look into the weights of the base when they begin
        return
    except PEFT_ERRORS as error:
        raise _cannot_attach(checkpoint, error) from error
    _check_names(checkpoint, model)


def _config(checkpoint: Checkpoint) -> PeftConfig:
    """PEFT's configuration, of which it would leave out what it does not know with a warning.

    Raises:
        Incompatible: a key is not known, or a value is none that it takes.
    """
    try:
        config: PeftConfig = PeftConfig.from_pretrained(str(checkpoint.path))
    except (ValueError, TypeError, KeyError) as error:
        raise _cannot_attach(checkpoint, error) from error
    plain: tuple[Any, ...] = (None, False, [], {}, "")
    if odd := [key for key, value in checkpoint.config.items() if not hasattr(config, key) and value not in plain]:
        raise Incompatible(
            f"{checkpoint.path} has options that PEFT does not know here: {', '.join(odd)}",
            hint="pip install --upgrade stackctl-lora, or save it again without them",
        )
    return config


def _cannot_attach(checkpoint: Checkpoint, error: Exception) -> Incompatible:
    return Incompatible(
        f"PEFT cannot put {checkpoint.path} on this base: {first_line(error)[:300]}",
        hint="use it on the base it was trained on (--base), or save it again there",
    )


def _check_names(checkpoint: Checkpoint, model: PeftModel) -> None:
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    wanted = {name: tuple(tensor.shape) for name, tensor in state.items()}
    untold = _untold(checkpoint)
    besides = {name for name, slot in checkpoint.slots.items() if slot.module in untold}
    besides |= {name for name in checkpoint.tensors if name.endswith(_COPIED)}
    found = {name: tensor.shape for name, tensor in checkpoint.tensors.items() if name not in besides - wanted.keys()}
    unfit = [f"{n} ({list(found[n])}, not {list(wanted[n])})" for n in wanted if found.get(n, wanted[n]) != wanted[n]]
    problems = {
        "tensors are missing": wanted.keys() - found.keys(),
        "tensors that its configuration does not explain on this base": found.keys() - wanted.keys(),
        "tensors that do not fit": unfit,
    }
    if told := [f"{what}: {listed(sorted(names, key=natural_order))}" for what, names in problems.items() if names]:
        raise Incompatible(
            f"{checkpoint.path}: {'; '.join(told)}",
            hint="use it on the base it was trained on (--base), or save it again there",
        )


def convert(stacked: StackedModel, checkpoint: Checkpoint, wanted: Truncation) -> tuple[LowRankPairs, Original]:
    """Make a plain LoRA of an adapter, on a base into which the stack is folded that it was trained on.

    The model is as it was afterwards.

    Raises:
        Incompatible: PEFT cannot attach it, or what it changes is no change of weights.
        VerificationFailed: its tensors are damaged, or merged it does not do what it does live.
    """
    model, config = stacked.model, _config(checkpoint)
    tensors = _read(checkpoint)
    tokens = probe_tokens(stacked.base)
    without = probe(model, tokens)
    biases = {slot.module: tensors[name] for name, slot in checkpoint.slots.items() if slot.role == "bias"}
    untold = _untold(checkpoint)
    targets = _targets(checkpoint, stacked)
    apart = {slot.module for slot in checkpoint.slots.values() if slot.role == "saved"}
    sharing = sharing_weights(model, targets, apart=apart)
    kept = {name: Kept(model.get_submodule(name)) for name in {*targets, *biases, *untold, *sharing}}
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            attached = get_peft_model(model, config, ADAPTER).eval()
        _check_names(checkpoint, attached)
        begun = Begun(checkpoint, model, kept, sharing)
        loaded: Any = set_peft_model_state_dict(attached, tensors, ADAPTER)
    except PEFT_ERRORS as error:
        raise _cannot_attach(checkpoint, error) from error
    if lost := loaded.unexpected_keys:
        raise Incompatible(
            f"{checkpoint.path}: PEFT does not find its tensors again when it loads them on '{stacked.base.name}': "
            f"{listed(lost)}",
            hint="train it on another base",
        )
    original = Original(tokens, probe(attached, tokens), without)
    found = LowRankPairs(
        wanted,
        saved=_whole(checkpoint, tensors),
        saved_modules=sorted({*(checkpoint.config.get("modules_to_save") or ()), *untold}),
        biases={name: b.float() for name, b in biases.items() if not torch.equal(b, kept[name].values["bias"].to(b))},
    )
    _merge_layers(model, found, kept, begun)
    merged = _probe_merged(model, tokens)
    for module in kept.values():
        module.restore()
    model.__dict__.pop("peft_config", None)
    if difference(without, original.live) > 1e-6 and original.error(merged) > _OUTPUT_TOLERANCE:
        raise Incompatible(
            f"merged into the weights {checkpoint.path} does not do what it does live: more than weights change",
            hint="use it with PEFT itself",
        )
    if not found.pairs:
        raise Incompatible(f"{checkpoint.path} changes no linear layer", hint="there is nothing to make a LoRA of")
    return found, original


def _merge_layers(model: nn.Module, found: LowRankPairs, kept: dict[str, Kept], begun: Begun) -> None:
    """Merge the adapter into every layer that it is on, which takes it off there, and keep what that changes."""
    for name, layer in tuner_layers(model, BaseTunerLayer):
        if name not in kept:
            raise Incompatible(
                f"PEFT puts the adapter on {name}, where its configuration does not say so",
                hint="train it again, on modules that are named in full",
            )
        if is_called(model, name):
            merged, factors = merged_layer(name, layer), begun.difference(name, layer)
        else:  # beside it the adapter has no effect, and merged it would have one
            merged, factors = layer.get_base_layer(), []
        _keep(found, name, kept[name], merged, factors)
        model.set_submodule(name, layer.get_base_layer())
        kept[name].set(merged.weight, getattr(merged, "bias", None))
    for name in begun.neighbours:  # what was taken out of a weight is gone for whoever shares it
        _keep(found, name, kept[name], model.get_submodule(name), begun.taken_out(name))


def _probe_merged(model: nn.Module, tokens: Tensor) -> Tensor:
    """The logits of a merged model with the modules that the adapter brings whole, which are taken off again."""
    whole = tuner_layers(model, ModulesToSaveWrapper)
    for name, wrapper in whole:
        model.set_submodule(name, wrapper.modules_to_save[ADAPTER])
    logits = probe(model, tokens)
    for name, wrapper in whole:
        model.set_submodule(name, wrapper.original_module)
    return logits


def subtract(now: StackPlan, begun: StackPlan, wanted: Truncation) -> LowRankPairs:
    """A plain LoRA out of an adapter and the same one as it was before its training, which its base was left without.

    Both plans are of one member, which begins with a change of zero: ΔW = s B A - s₀ B₀ A₀.
    """
    found = LowRankPairs(wanted)
    with torch.no_grad(), MemberTensors(now) as tensors, MemberTensors(begun) as before:
        for name, module in now.modules.items():
            factors = [*tensors.factors(module), *((a, b, -s) for a, b, s in before.factors(begun.modules[name]))]
            delta = algebra.delta(factors, torch.float64)
            if float(delta.abs().max()):
                found.put_sum(name, factors, delta)
    return found


def probe_tokens(base: Base) -> Tensor:
    """Some tokens of a base, (1, T), to look at logits with."""
    return torch.arange(3, 3 + _TOKENS)[None] * 7 % base.vocabulary_size


def _read(checkpoint: Checkpoint) -> dict[str, Tensor]:
    tensors = load_file(checkpoint.weights_path)
    if odd := sorted(name for name, tensor in tensors.items() if not all_finite(tensor)):
        raise VerificationFailed(
            f"{checkpoint.path} holds NaN or infinity in {listed(odd)}", hint="get it again from where it was made"
        )
    return tensors


def _targets(checkpoint: Checkpoint, stacked: StackedModel) -> list[str]:
    base = stacked.base
    return sorted(expected_targets(checkpoint.config, expand_modules(base.modules), base.output_embedding) or ())


def _untold(checkpoint: Checkpoint) -> set[str]:
    """The embedding and the head, where PEFT saved them beside the adapter and its configuration does not say so."""
    saved = {slot.module for slot in checkpoint.slots.values() if slot.role == "saved"}
    return {module for module in saved if not checkpoint.is_told_to_save(module)}


def _whole(checkpoint: Checkpoint, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The parameters of modules that the adapter brings whole, by their names in the base."""
    slots = checkpoint.slots.items()
    return {f"{s.module}.{name.rpartition('.')[2]}": tensors[name] for name, s in slots if s.role == "saved"}


def _keep(found: LowRankPairs, name: str, kept: Kept, merged: Any, factors: list[algebra.Factors]) -> None:
    """Keep what merging changed in one layer: its weight as a pair, that of the sum of ``factors`` where they are
    known to be all of it; its bias whole."""
    delta = merged.weight.detach().double() - kept.values["weight"].double()
    if isinstance(merged, (Conv1D, nn.Embedding)):
        delta = delta.T
    bias = getattr(merged, "bias", None)
    if bias is not None and "bias" not in kept.values:
        raise Incompatible(f"it gives {name} a bias, and the base has none there", hint="use it with PEFT itself")
    if bias is not None and not torch.equal(bias, kept.values["bias"].double()):
        found.biases[name] = bias.detach().float().cpu()
    if not bool(delta.any()):
        return
    if factors and difference(algebra.delta(factors, torch.float64), delta.cpu()) < _SAME:
        found.put_sum(name, factors, delta.cpu())
    else:
        found.keep(name, delta.cpu())
