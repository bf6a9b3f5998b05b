"""Why members do not fit the base or one another: problems that a plan may have. Pure: no disk, no tensors.

What a member alone is refused for stands in :mod:`stackctl.plan.refusals`.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence

from stackctl.core.errors import did_you_mean, listed
from stackctl.core.expressions import format_term
from stackctl.core.provenance import EntryProblem
from stackctl.core.schema import Base, ModuleShape
from stackctl.lora.checkpoint import CONFIG
from stackctl.lora.naming import Naming, is_unread
from stackctl.lora.recognition import recognise_model
from stackctl.lora.safetensors_header import DTYPE_NAMES
from stackctl.lora.target_modules import expected_targets, lora_rank, natural_order
from stackctl.lora.target_parameters import EXPERTS, Pairs, expected_parameters, is_turned, pattern_name
from stackctl.plan.layer_weights import names_nothing
from stackctl.plan.refusals import saved_modules
from stackctl.plan.stack_plan import PlanMember, Problem, Replacement
from stackctl.plan.token_rows import ADD_TOKENS, CUT_ROWS, REGISTER_AGAIN


def same_adapter_twice(members: Sequence[PlanMember]) -> Iterator[Problem]:
    labels: dict[str, list[str]] = {}
    for member in members:
        labels.setdefault(member.adapter or member.label, []).append(member.label)
    for name, found in labels.items():
        if len(found) > 1:
            times = "twice" if len(found) == 2 else f"{len(found)} times"
            what = f"the adapter '{name}' is in the stack {times} ({' and '.join(dict.fromkeys(found))})"
            hint = "name it once, with the weight that it should have"
            yield Problem("same_adapter_twice", what, hint, found[1])


def unlike_bases(base: Base | None, members: Sequence[PlanMember]) -> Iterator[Problem]:
    if len({member.base for member in members if member.base}) > 1:
        which = ", ".join(f"{m.label} on {m.base}" for m in members)
        yield Problem("unlike_bases", f"the members have different bases: {which}", "use adapters of one base")
        return
    for member in members:
        if base and member.fingerprint and member.fingerprint != base.fingerprint:
            what = f"{member.label} was trained on another model than the base '{base.name}' now is"
            hint = f"register that model under another name, or train {member.adapter} again"
            yield Problem("other_base", f"{what} (fingerprints differ)", hint, member.label)


def recorded_problems(label: str, recorded: Iterable[EntryProblem]) -> list[Problem]:
    """The warnings that a version's own entry holds."""
    return [Problem(found.code, f"{label}: {found.message}", found.hint, label, "warning") for found in recorded]


def unfitting_tensors(
    member: PlanMember, pairs: Pairs, known: dict[str, ModuleShape] | None, base: Base | None
) -> list[Problem]:
    """Missing, extra and misshapen tensors of one member; ``pairs`` are its factors by what they stand on."""
    if known is None or base is None:
        return list(_damaged(member, pairs, known, base))
    missing = [m for m in pairs if m not in known]
    if missing and (other := recognise_model(member.checkpoint.config, pairs)):
        return [Problem(other.kind, f"{member.label} {other.what}", other.hint, member.label)]
    return [
        *_damaged(member, pairs, known, base),
        *_not_of_base(member, pairs, known, base),
        *_not_of_configuration(
            member, pairs, known, expected_targets(member.checkpoint.config, known, base.output_embedding)
        ),
    ]


def _told(
    member: PlanMember, code: str, names: Sequence[str], what: str, hint: str = REGISTER_AGAIN
) -> Iterator[Problem]:
    """What is wrong with some tensors or modules, if there are any."""
    if names:
        yield Problem(code, f"{member.label}: {what}: {listed(names)}", hint, member.label)


def _damaged(
    member: PlanMember, pairs: Pairs, known: dict[str, ModuleShape] | None, base: Base | None
) -> Iterator[Problem]:
    """Tensors that are no LoRA's, or not that of the configuration."""
    label, checkpoint = member.label, member.checkpoint
    if not pairs:
        yield Problem("no_tensors", f"{label} holds no LoRA tensors", REGISTER_AGAIN, label)
    single = [m for m, pair in pairs.items() if set(pair) != {"A", "B"}]
    yield from _told(member, "missing_tensors", single, "one factor is missing of")
    other_types = [n for n, t in checkpoint.tensors.items() if t.dtype not in DTYPE_NAMES]
    yield from _told(member, "dtype", other_types, "not a floating-point tensor")
    config = checkpoint.config
    explained = {"unknown": False, "bias": config.get("bias", "none") != "none", "magnitude": config.get("use_dora"),
                 "lora_bias": config.get("lora_bias")}  # fmt: skip
    extra = [n for role, said in explained.items() if not said for n, s in checkpoint.slots.items() if s.role == role]
    if known is None:  # a whole weight may be the base's embedding or head, whatever that calls it
        extra = [name for name in extra if "lora_" in name or not name.endswith(".weight")]
    yield from _told(member, "extra_tensors", extra, "tensors that its configuration does not explain")
    turned = [m for m in pairs if known is not None and m in known and is_turned(config, m, known[m])]
    why = "target_parameters names an embedding or a Conv1D, whose factors lie the other way round there"
    yield from _told(member, "target_parameters", turned, why, "train it again with target_modules")
    wrong_rank, wrong_shape = _misshapen(member, {m: pair for m, pair in pairs.items() if m not in turned}, known)
    yield from _told(member, "rank", wrong_rank, "the rank in its tensors is not the one in its configuration")
    if base is None:
        yield from _told(member, "shape", wrong_shape, "factors that do not fit each other")
    else:
        what = f"tensors that do not fit {base.name}"
        yield from _told(member, "shape", wrong_shape, what, _where_it_fits(member, base))


def _not_of_base(member: PlanMember, pairs: Pairs, known: dict[str, ModuleShape], base: Base) -> Iterator[Problem]:
    """Modules that the base does not have, or on which no LoRA can be composed."""
    if shared := [m for m in pairs if m in known and known[m].type == "Shared"]:
        yield shared_modules(member.label, shared)
    older = [m for m in pairs if m in known and known[m].type in ("Parameter", "Other")]
    hint = f"register the base again: stackctl base rm {base.name}, then stackctl base add {base.name} SOURCE"
    yield from _told(
        member, "older_entry", older, f"parameters whose layout the entry of {base.name} does not tell", hint
    )
    missing = [m for m in pairs if m not in known]
    parameters = member.checkpoint.config.get("target_parameters") or ()
    odd = [name for name in parameters if missing and not expected_parameters({"target_parameters": [name]}, known)]
    what = f"target_parameters names what is no matrix of {base.name} that a LoRA can stand on"
    yield from _told(member, "unknown_modules", odd, what, "train it again without them")
    missing = [] if odd else missing
    what = f"modules that {base.name} does not have"
    yield from _told(member, "unknown_modules", missing, what, _where_it_fits(member, base))


def shared_modules(label: str, modules: Sequence[str]) -> Problem:
    why = "modules whose weight other modules use as well, so that none can be changed alone"
    return Problem("shared_modules", f"{label}: {why}: {listed(modules)}", "train it again without them", label)


def _not_of_configuration(
    member: PlanMember, pairs: Pairs, known: dict[str, ModuleShape], expected: set[str] | None
) -> Iterator[Problem]:
    """Modules that the configuration tells and the tensors do not, and the other way round."""
    config, whole = member.checkpoint.config, _missing_whole(member, known)
    yield from _told(member, "missing_tensors", whole, "whole modules are missing (modules_to_save)")
    if expected is None:
        if pairs and not config.get("target_parameters"):  # PEFT would take its own choice, and drop the others
            names = json.dumps(sorted({name.rpartition(".")[2] for name in pairs}))
            what = f"{member.label}: its configuration does not say which modules it is for (target_modules)"
            yield Problem("no_targets", what, f'write into its {CONFIG}: "target_modules": {names}', member.label)
        return
    found = {m for m in pairs if m in known}
    untargeted = [m for m in sorted(found - expected, key=natural_order) if known[m].type != "Shared"]
    odd = [m for m in untargeted if known[m].type == "Matrix"]
    why = "modules that are no plain linear layers, on which PEFT runs no LoRA"
    yield from _told(member, "no_linear_layer", odd, why, "train it again without them")
    missing = sorted(expected - found, key=natural_order)
    yield from _told(member, "missing_tensors", missing, "tensors are missing for")
    untargeted = [m for m in untargeted if m not in odd]
    yield from _told(member, "extra_tensors", untargeted, "tensors for modules that it does not target")


def unread_tensors(member: PlanMember, pairs: Pairs, naming: Naming, base: Base) -> Iterator[Problem]:
    """A LoRA that PEFT does not find when it loads the checkpoint, so that nobody has seen it work since it was saved.

    By names of before, which PEFT renames to these, it finds all of it.
    """
    lost = [name for name in pairs if naming.keeps(name) and is_unread(name, base)]
    what = f"PEFT does not find its tensors again when it loads them on a {base.architecture}"
    yield from _told(member, "unread_tensors", lost, what, "train it without those modules")


def unfitting_layer_weights(
    member: PlanMember, known: Mapping[str, ModuleShape], own: Iterable[str]
) -> Iterator[Problem]:
    """Weights for layers or modules that the base does not have, or on which no member stands."""
    if not member.layer_weights:
        return  # looking at every module takes time
    absent = names_nothing(member.layer_weights, known)
    idle = [name for name in names_nothing(member.layer_weights, own) if name not in absent]
    if absent:
        what = f"{member.label} has weights for what the base does not have: {', '.join(absent[:3])}"
        like = next(iter(sorted(known, key=natural_order)), "")
        hint = did_you_mean(absent[0], list(known), f"name a layer or a module as the base does: {like}")
        yield Problem("layer_weights", what, hint, member.label)
    if idle:
        what = f"{member.label} has weights for what it does not change: {', '.join(idle[:3])}"
        yield Problem("layer_weights", what, "they can be left out", member.label, "warning")


def other_rows(member: PlanMember, naming: Naming, base: Base) -> Iterator[Problem]:
    """Embeddings or a head that a member brings with another number of rows than the base has."""
    for module, shape in saved_modules(member).items():
        own = naming.known.get(module)
        if own is None or own.type in (*EXPERTS, "Parameter", "Other"):
            continue  # a norm, for one, of which an entry tells nothing
        wanted = tuple(reversed(own.shape) if own.type == "Conv1D" else own.shape)
        if shape == wanted:
            continue
        if shape[1:] == wanted[1:]:
            what = f"{member.label}: its {module} has {shape[0]:,} rows and that of {base.name} {wanted[0]:,}: "
            more = "tokens were added to the base that it was trained on", ADD_TOKENS
            fewer = "rows were taken off the base that it was trained on", CUT_ROWS
            why, hint = more if shape[0] > wanted[0] else fewer
            yield Problem("rows", what + why, hint, member.label)
        else:
            what = f"{member.label}: its {module} is {list(shape)}, and that of {base.name} {list(wanted)}"
            yield Problem("shape", what, _where_it_fits(member, base), member.label)


def _where_it_fits(member: PlanMember, base: Base) -> str:
    """What to do with an adapter whose names or shapes a base does not have; it may say that it was made on that."""
    said = str(member.checkpoint.config.get("base_model_name_or_path") or "")
    if said and said.rstrip("/") in (base.hub_id, base.source, base.name):
        return f"it names {base.name} as its base, but was made on another class or revision of it: save it again there"
    return f"use it on the base it was trained on, not on {base.name}"


def _missing_whole(member: PlanMember, known: dict[str, ModuleShape]) -> list[str]:
    """Modules that were trained as a whole, by the configuration, and of which there is no tensor."""
    saved = [slot.module for slot in member.checkpoint.slots.values() if slot.role == "saved"]
    return [
        name
        for name in member.checkpoint.config.get("modules_to_save") or ()
        if any(module.endswith(name) for module in known) and not any(name in module for module in saved)
    ]


def _misshapen(member: PlanMember, pairs: Pairs, known: dict[str, ModuleShape] | None) -> tuple[list[str], list[str]]:
    config, wrong_rank, wrong_shape = member.checkpoint.config, list[str](), list[str]()
    for module, pair in pairs.items():
        if set(pair) != {"A", "B"}:
            continue
        a, b = pair["A"].shape, pair["B"].shape
        if len(a) != 2 or len(b) != 2 or a[0] != b[1] or 0 in (*a, *b):
            wrong_shape.append(f"{module} (A {list(a)}, B {list(b)})")
            continue
        shape = known.get(module) if known is not None else None
        if shape is not None and shape.type in ("Parameter", "Other"):
            continue
        experts = shape.shape[0] if shape and shape.type in EXPERTS else 1
        rank = lora_rank(config, pattern_name(config, module, shape)) * experts
        if a[0] != rank and not (known is None and config.get("target_parameters") and a[0] % rank == 0):
            wrong_rank.append(f"{module} ({a[0]}, not {rank})")
        if shape is None:
            continue
        fits = [a[1], b[0]] if shape.type == "Embedding" else [b[0], a[1]]
        fits = [experts, *fits] if shape.type in EXPERTS else fits
        is_embedding = "lora_embedding" in pair["A"].name
        if fits != shape.shape or is_embedding != (shape.type == "Embedding"):
            wrong_shape.append(f"{module} ({fits}, not {shape.shape})")
    return wrong_rank, wrong_shape


def saved_with_changes(
    replacements: Sequence[Replacement], members: Sequence[PlanMember], standing: Mapping[str, Sequence[int]]
) -> list[Problem]:
    """Members that bring a module whole and were trained on one with a LoRA there: the value holds its change as well.

    ``standing`` has the numbers of the members with a LoRA on each module.
    """
    problems = []
    for replacement in replacements:
        module, own = replacement.parameter.removesuffix(".weight"), members[replacement.member]
        for other in (members[number] for number in standing.get(module, ())):
            if other.label in own.trained_on:
                what = f"{own.label} brings {module} whole and was trained on {other.label}, which has a LoRA on it: "
                what += "whether it holds that change as well is not known"
                problems.append(Problem("modules_to_save", what, f"leave out {other.label}, or train them again"))
    return problems


def clashing_replacements(replacements: Sequence[Replacement], members: Sequence[PlanMember]) -> list[Problem]:
    """Two members that bring the same parameter, or whole modules of their own, which nothing has seen together."""
    owners: dict[str, list[str]] = {}
    savers = {r.member for r in replacements if members[r.member].checkpoint.config.get("modules_to_save")}
    for replacement in replacements:
        owners.setdefault(replacement.parameter, []).append(members[replacement.member].label)
    clashes = {parameter: labels for parameter, labels in owners.items() if len(labels) > 1}
    if not clashes and len(savers) > 1:
        clashes = {r.parameter: [members[r.member].label] for r in replacements if r.member in savers}
    if not clashes:
        return []
    labels = sorted({label for found in clashes.values() for label in found})
    names = ", ".join(sorted(clashes)[:3])
    what = f"{' and '.join(labels)} each bring their own {names} (modules_to_save or bias)"
    return [Problem("modules_to_save", what, "only one member of a stack may carry whole modules")]


def missing_foundations(members: Sequence[PlanMember]) -> Iterator[Problem]:
    """A warning where a member stands without what it was trained on, or on another version of it."""
    present = {
        m.adapter: format_term(m.label, m.weight) + (" weighted by layer" if m.layer_weights else "") for m in members
    }
    for member in members:
        for needed in member.trained_on if member.is_used else ():
            name = needed.partition("@")[0]
            if present.get(name) == needed:
                continue
            instead = f", here {present[name]} is" if name in present else ", which is not in this stack"
            what = f"{member.label} was trained on {needed}{instead}"
            compose = f"for what was trained, compose {'+'.join([*member.trained_on, member.label])}"
            yield Problem("foundation", what, _move(member, present) + compose, member.label, "warning")


def _move(member: PlanMember, present: Mapping[str, str]) -> str:
    """The command that moves a member onto what is beneath it here; nothing where some of that is missing."""
    below = [present.get(needed.partition("@")[0], " ") for needed in member.trained_on]
    if any(" " in term for term in below):  # not there, or weighted by layer, which nothing is trained on
        return ""
    data = shlex.quote(member.data) if member.data else "FILE"
    on = "+".join(below)
    return f"move it: stackctl train {member.adapter} --on {on} --from {member.label} --data {data}; "
