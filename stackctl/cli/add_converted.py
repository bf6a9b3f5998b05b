"""``stackctl add --convert``: a plain LoRA of another kind of adapter, proved against the original and registered."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from stackctl.cli.command import Context
from stackctl.core.errors import Incompatible, Usage, VerificationFailed
from stackctl.core.provenance import Converted
from stackctl.core.schema import Base, ModuleShape
from stackctl.lora.checkpoint import CONFIG, WEIGHTS, Checkpoint, find_checkpoint_folder, read_checkpoint
from stackctl.lora.convertible import CONVERTED_CODES, kind_of, needs_initial, variant_of
from stackctl.lora.naming import on_base
from stackctl.lora.recognition import recognise_task
from stackctl.lora.target_modules import expand_modules, expected_targets, natural_order
from stackctl.plan.build import plan_stack
from stackctl.plan.refusals import refusals
from stackctl.plan.stack_plan import PlanMember, Problem, StackPlan, refuse
from stackctl.plan.validate import shared_modules
from stackctl.registry.checkpoint_files import copy_checkpoint
from stackctl.registry.planning import read_plan
from stackctl.registry.resolve import ResolvedStack
from stackctl.registry.versions import NewVersion, find_same_version, register_checkpoint, version_facts
from stackctl.render.output import Result
from stackctl.storage import atomic

if TYPE_CHECKING:
    from stackctl.engine.models import StackedModel
    from stackctl.engine.to_lora.conversion import Original
    from stackctl.engine.to_lora.low_rank import LowRankPairs

_PROVED = 1e-3
"""Where next to nothing of the weights is lost, this share at most of the effect on the logits may be."""

_option = partial(typer.Option, rich_help_panel="Another kind of adapter")


@dataclass(frozen=True)
class Conversion:
    """What was asked for: each field is an option of add, with its help."""

    convert: Annotated[
        bool, _option(help="Make a plain LoRA of it: of DoRA, LoHa, LoKr, MiSS, VeRA, PiSSA, IA3, OFT and more.")
    ] = False
    rank: Annotated[int | None, _option(help="Rank of each layer's pair, at most.", metavar="N")] = None
    tolerance: Annotated[
        float | None,
        _option(
            help="The share of a layer's change that may be lost; without --rank and --tolerance none where the "
            "change has a small rank, else 0.01."
        ),
    ] = None
    initial: Annotated[
        Path | None,
        _option(help="The same adapter before its training, if it began with CorDA, LoRA-GA or PiSSA's fast form."),
    ] = None

    def problems(self, *, link: bool) -> Iterator[Usage]:
        """Everything that is wrong with them."""
        rank, tolerance = self.rank, self.tolerance
        given = {"--rank": rank, "--tolerance": tolerance, "--initial": self.initial}
        named = [name for name, value in given.items() if value is not None]
        if named and not self.convert:
            yield Usage(f"{' and '.join(named)}: only with --convert", hint="add --convert")
        if self.convert and link:
            yield Usage("--link refers to a folder, and --convert makes another one", hint="leave out --link")
        if rank is not None and tolerance is not None:
            yield Usage("--rank and --tolerance are two ways to say how much is kept", hint="leave out one of them")
        if rank is not None and not 1 <= rank <= 65536:
            yield Usage(f"--rank {rank} is not a rank", hint="give a number from 1 to 65536")
        if tolerance is not None and not 0 < tolerance < 1:
            yield Usage(f"--tolerance {tolerance:g} is not between 0 and 1", hint="give a share, for example 0.01")

    def kind(self, checkpoint: Checkpoint) -> str | None:
        """What an adapter is that is made a plain LoRA; None where it is one, or cannot or need not be made one.

        Raises:
            Usage: the options are of no use for it.
            Incompatible: it can be made one, with what stands in the way.
        """
        if not self.convert:
            return None
        config, kind = checkpoint.config, kind_of(checkpoint.config)
        if kind is None:
            if checkpoint.is_lora and (self.rank, self.tolerance, self.initial) != (None, None, None):
                raise Usage(
                    f"{checkpoint.path} is not converted: it is a plain LoRA, or cannot be made one",
                    hint="leave out --convert and what belongs to it",
                )
            return None
        if self.initial and (not checkpoint.is_lora or variant_of(config)):
            raise Usage(f"--initial is of no use for {kind}", hint="leave it out")
        if needs_initial(config) and (not self.initial or variant_of(config)):
            began = f"{checkpoint.path} began with {config.get('init_lora_weights')}"
            what = "which took something out of its base that only the adapter as it was before its training tells"
            give = "add --initial FOLDER, where that was saved"
            raise Incompatible(
                f"{began}, {what}", hint="train it again as a plain LoRA" if variant_of(config) else give
            )
        return kind


def add_converted(
    context: Context, wanted: Conversion, checkpoint: Checkpoint, stack: ResolvedStack, new: NewVersion
) -> Result:
    """Make a plain LoRA of a checkpoint, prove it and register it."""
    registry, name, say = context.registry, new.name, context.output.status
    kind = kind_of(checkpoint.config)
    assert kind is not None
    plan = read_plan(registry, stack).check()
    checkpoint = on_base(checkpoint, stack.base)
    _check(checkpoint, name, stack.base)
    from stackctl.engine.quick_imports import import_peft, import_transformers

    import_transformers()
    import_peft()
    from stackctl.engine.models import load_base
    from stackctl.engine.to_lora.conversion import check_header, device

    differences = _differences(name, checkpoint, wanted, plan) if wanted.initial else None
    if differences is None:
        check_header(checkpoint, context.base_folder(stack.base))
    say(f"making a plain LoRA of {kind}")
    stacked = load_base(stack.base, registry, dtype="float32", device=device(), say=say)
    stacked.use(plan)
    pairs, original = _convert(stacked, checkpoint, differences, wanted)
    still_true = {key: checkpoint.config[key] for key in ("peft_version", "revision") if checkpoint.config.get(key)}
    with atomic.staging_directory(registry.root / "weights") as staged:
        copy_checkpoint(checkpoint.path, staged)
        for file in (CONFIG, WEIGHTS):
            (staged / file).unlink()
        pairs.write(staged, stack.base, still_true)
        made = read_checkpoint(staged)
        alone = plan_stack(stack.base, [PlanMember(name, 1.0, made, name)]).check()
        told = Converted(
            from_=kind, digest=checkpoint.digest(), relative_error=pairs.relative_error,
            output_error=_proved(stacked, plan, alone, original, pairs), errors=pairs.errors,
        )  # fmt: skip
        known = find_same_version(registry, name, made.digest(), stack)
        version = known or register_checkpoint(registry, new, staged, converted=told)
    label = f"{name}@{version.version}"
    data = {
        **version_facts(registry, name, version, stack.base.name),
        "rank": pairs.rank,
        "converted": {key: value for key, value in msgspec.to_builtins(told).items() if key != "errors"},
    }
    said = f"{label} is registered already" if known else f"registered {label}"
    text = (
        f"{said}: made of {kind}, rank {pairs.rank} on {len(pairs.pairs)} modules, {version.parameters:,} parameters; "
        f"{told.relative_error:.2g} of the change in the weights is lost, {told.output_error:.2g} of that in the logits"
    )
    return Result(data, label, text)


def _check(checkpoint: Checkpoint, name: str, base: Base) -> None:
    """Hold everything against a checkpoint that its configuration and header show and conversion does not mend.

    Raises:
        Incompatible: with all of it.
    """
    member = PlanMember(name, 1.0, checkpoint, name)
    problems = [p for p in refusals(member, base) if p.severity == "error" and p.code not in CONVERTED_CODES]
    if not checkpoint.is_lora:
        problems = []  # those are the options of a LoRA; PEFT's class for the type knows its own
    if found := recognise_task(checkpoint.config, checkpoint.tensors):
        problems.append(Problem(found.kind, f"{name} {found.what}", found.hint))
    if empty := [tensor for tensor, info in checkpoint.tensors.items() if 0 in info.shape]:
        what = f"{len(empty)} of its tensors are empty, {empty[0]} among them"
        problems.append(Problem("empty_tensors", what, "save it again"))
    known = expand_modules(base.modules)
    shared = {module: ModuleShape(type="Linear", shape=s.shape) for module, s in known.items() if s.type == "Shared"}
    if chosen := expected_targets(checkpoint.config, shared, base.output_embedding):
        problems.append(shared_modules(name, sorted(chosen, key=natural_order)))
    refuse(problems)


def _differences(
    name: str, checkpoint: Checkpoint, wanted: Conversion, stack: StackPlan
) -> tuple[StackPlan, StackPlan]:
    """The plans of an adapter and of the same one before its training, as if both were plain.

    Raises:
        Incompatible: they do not stand on the same modules of the base.
    """
    assert wanted.initial is not None
    before = read_checkpoint(find_checkpoint_folder(wanted.initial))
    plain = {"init_lora_weights": True}
    plans = [
        plan_stack(stack.base, [PlanMember(label, 1.0, replace(found, config={**found.config, **plain}), label)])
        for label, found in ((name, checkpoint), (f"{name} before its training", before))
    ]
    refuse([problem for plan in plans for problem in plan.errors])
    now, begun = plans
    if stack.known_base.tied_embeddings and (head := stack.known_base.output_embedding) in now.modules:
        raise Incompatible(
            f"{checkpoint.path} began with {checkpoint.config.get('init_lora_weights')} on {head}, which "
            f"'{stack.known_base.name}' ties to its embedding: what was taken out of the one is gone from the other",
            hint="train it again as a plain LoRA",
        )
    shapes = [{key: (m.shape, m.experts) for key, m in plan.modules.items()} for plan in plans]
    if shapes[0] != shapes[1] or now.replacements or begun.replacements:
        odd = sorted(set(shapes[0]) ^ set(shapes[1])) or ["modules_to_save"]
        raise Incompatible(
            f"{wanted.initial} is not {checkpoint.path} before its training: they differ in {', '.join(odd[:3])}",
            hint="give the folder that was saved before the first step of that training",
        )
    return now, begun


def _convert(
    stacked: StackedModel, checkpoint: Checkpoint, differences: tuple[StackPlan, StackPlan] | None, wanted: Conversion
) -> tuple[LowRankPairs, Original]:
    from stackctl.engine.loss.logits import probe
    from stackctl.engine.to_lora import conversion
    from stackctl.engine.to_lora.low_rank import Truncation

    kept = Truncation(wanted.rank, wanted.tolerance)
    if differences is None:
        return conversion.convert(stacked, checkpoint, kept)
    now, begun = differences
    pairs = conversion.subtract(now, begun, kept)
    tokens = conversion.probe_tokens(stacked.base)
    without = probe(stacked.model, tokens)
    stacked.fold(now)
    stacked.fold(plan_stack(begun.base, [replace(begun.members[0], weight=-1.0)]))
    live = probe(stacked.model, tokens)
    return pairs, conversion.Original(tokens, live, without)


def _proved(stacked: StackedModel, stack: StackPlan, new: StackPlan, original: Original, pairs: LowRankPairs) -> float:
    """How far what was written is from the original in its logits, read back by the road that every stack takes.

    Raises:
        VerificationFailed: nothing is lost in the weights, and still something in the logits.
    """
    from stackctl.engine.loss.logits import probe

    stacked.use(stack)
    stacked.fold(new)
    error = original.error(probe(stacked.model, original.tokens))
    if not error <= max(_PROVED, 1e3 * pairs.relative_error):
        raise VerificationFailed(
            f"what was made does not do what the original does: its logits are {error:.2g} of the effect away",
            hint="convert it with PEFT's own convert_to_lora, and compare",
        )
    return error
