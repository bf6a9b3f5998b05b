"""Rows of single tokens that a member trained (PEFT's ``trainable_token_indices``): what they are, what stands in the
way. Pure: names and shapes alone.

PEFT saves the new rows of an embedding or a head themselves, not what changed: ``….token_adapter.
trainable_tokens_delta`` (tokens, width), in the order of the indices in its configuration, a list for the input
embedding or a mapping of module names (src/peft/utils/other.py: set_additional_trainable_modules). Where embedding and
head are tied, rows of the embedding are those of the head as well, unless the head has rows of its own, or PEFT does
not see that they are tied (``Base.rows_apart``).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from stackctl.core.errors import Incompatible, listed
from stackctl.core.schema import Base, ModuleShape
from stackctl.lora.checkpoint import Checkpoint
from stackctl.lora.naming import Naming
from stackctl.lora.safetensors_header import TensorInfo
from stackctl.plan.layer_weights import Weights
from stackctl.plan.stack_plan import PlanMember, Problem, Replacement, StackPlan, TokenRows

KEY = "trainable_token_indices"
ADD_TOKENS = "add them to the base (transformers: resize_token_embeddings), register that, and add it there"
REGISTER_AGAIN = "register the checkpoint again from where it was made"
CUT_ROWS = "resize the base as it was there (transformers: resize_token_embeddings), register that, and add it there"
_NAMED = 8


def trained_tokens(checkpoint: Checkpoint) -> list[int]:
    """The numbers of all tokens whose rows a checkpoint brings."""
    return sorted({token for indices in _indices(checkpoint.config).values() for token in indices})


def member_rows(
    index: int, member: PlanMember, naming: Naming, base: Base | None
) -> tuple[list[TokenRows], list[Problem]]:
    """The rows that a member brings, by modules of the base, and all that is wrong with them."""
    saved, problems = _saved_rows(member, naming, base)
    weights = Weights.of(member.weight, member.layer_weights)
    rows: dict[str, TokenRows] = {}
    for name, tensor, tokens in saved:
        module = naming.place(name).module
        rows[module] = TokenRows(index, module, tokens, tensor, weights.at(module))
    if base is not None:
        problems += _unfitting(member, rows.values(), naming, base)
        embedding, head = base.input_embedding, base.output_embedding
        if base.ties_rows and embedding in rows and head and head not in rows:
            own = rows[embedding]
            rows[head] = TokenRows(index, head, own.tokens, own.tensor, weights.at(head))
    for module in rows:
        if module in {naming.place(name).module for name in member.checkpoint.pairs}:
            what = f"{member.label} has a LoRA on {module} and rows of single tokens in it, which PEFT cannot run"
            problems.append(Problem(KEY, what, "train it again with one of the two", member.label))
    return [row for row in rows.values() if row.weight != 0], problems


def _indices(config: Mapping[str, Any]) -> dict[str, list[int]]:
    """The tokens by the ends of module names; an empty name stands for whatever module there is."""
    told = config.get(KEY)
    if isinstance(told, list):
        return {"": told}
    return dict(told) if isinstance(told, dict) else {}


_Saved = tuple[str, TensorInfo, tuple[int, ...]]
"""The rows of one module in a checkpoint: its name there, the tensor, and the tokens."""


def _saved_rows(member: PlanMember, naming: Naming, base: Base | None) -> tuple[list[_Saved], list[Problem]]:
    checkpoint, label = member.checkpoint, member.label
    indices, saved, problems = _indices(checkpoint.config), list[_Saved](), list[Problem]()
    used = set[str]()
    for name, slot in checkpoint.slots.items():
        if slot.role != "tokens":
            continue
        # PEFT takes every module whose name ends so; of several keys the longest says it most exactly.
        key = max((key for key in indices if slot.module.endswith(key)), key=len, default=None)
        if not key and _is_tied_head(naming.place(slot.module).module, base):
            continue  # save_embedding_layers writes the embedding's rows for the head as well
        if key is None:
            what = f"{label}: rows of single tokens that its configuration does not name: {name}"
            problems.append(Problem("extra_tensors", what, REGISTER_AGAIN, label))
            continue
        used.add(key)
        tensor, tokens = checkpoint.tensors[name], tuple(indices[key])
        if len(tensor.shape) != 2 or tensor.shape[0] != len(tokens):
            what = f"{label}: {name} is {list(tensor.shape)}, and its configuration names {len(tokens)} tokens"
            problems.append(Problem("shape", what, REGISTER_AGAIN, label))
        elif len(set(tokens)) != len(tokens):
            what = f"{label} names a token twice in {KEY}, so that nothing says which row is meant"
            problems.append(Problem(KEY, what, "train it again with each token once", label))
        else:
            saved.append((slot.module, tensor, tokens))
    # A key without rows of its own says the tied head's tokens, which are those of the embedding.
    lost = [key for key in indices if key not in used and not any(indices[key] == indices[other] for other in used)]
    if lost:
        what = f"{label}: the rows are missing that its configuration names ({KEY})"
        problems.append(Problem("missing_tensors", what, REGISTER_AGAIN, label))
    return saved, problems


def _is_tied_head(module: str, base: Base | None) -> bool:
    return base is not None and base.tied_embeddings and module == base.output_embedding


def _unfitting(member: PlanMember, rows: Iterable[TokenRows], naming: Naming, base: Base) -> Iterator[Problem]:
    known = {naming.place(name).module: shape for name, shape in naming.known.items()}
    other = f"use it on the base it was trained on, not on {base.name}"
    for row in rows:
        shape: ModuleShape | None = known.get(row.module)
        if shape is None or not (shape.type == "Embedding" or row.module == base.output_embedding):
            what = f"{member.label}: rows of single tokens in {row.module}, which is not an embedding of {base.name}"
            yield Problem("unknown_modules", what, other, member.label)
        elif row.tensor.shape[1] != shape.shape[1]:
            what = f"{member.label}: its rows in {row.module} have {row.tensor.shape[1]} values, those of {base.name} "
            yield Problem("shape", f"{what}{shape.shape[1]}", other, member.label)
        elif beyond := [token for token in row.tokens if not 0 <= token < shape.shape[0]]:
            what = f"{member.label}: {row.module} of {base.name} has {shape.shape[0]:,} rows, and none of the tokens "
            yield Problem("rows", f"{what}{_listed(beyond)}", ADD_TOKENS, member.label)


def clashing_rows(
    rows: Sequence[TokenRows],
    members: Sequence[PlanMember],
    modules: Mapping[str, Collection[int]],
    replacements: Sequence[Replacement],
) -> Iterator[Problem]:
    """Tokens that two members trained, and modules of which one has rows and another a LoRA or all of it.

    ``modules`` has the numbers of the members that stand on each with a LoRA.
    """
    held: dict[str, set[int]] = {}
    for row in rows:
        held.setdefault(row.module, set()).add(row.member)
    for first, second in sorted({(a, b) for found in held.values() for a in found for b in found if a < b}):
        first_own, second_own = (
            {(row.module, token) for row in rows if row.member == member for token in row.tokens}
            for member in (first, second)
        )
        if twice := {token for _, token in first_own & second_own}:
            labels = f"{members[first].label} and {members[second].label}"
            what = f"{labels} each trained a row of their own for the token{'s' * (len(twice) > 1)} {_listed(twice)}"
            yield Problem(KEY, f"{what} ({KEY})", "only one member of a stack may train a token", members[second].label)
    whole: dict[str, set[int]] = {}
    for replacement in replacements:
        whole.setdefault(replacement.parameter.removesuffix(".weight"), set()).add(replacement.member)
    for module, own in held.items():
        lora, brought = set(modules.get(module, ())) - own, whole.get(module, set())
        for others, how in ((lora, "a LoRA on it"), (brought, "one of its own (modules_to_save)")):
            if others:
                names = " and ".join(members[m].label for m in sorted(own))
                theirs = " and ".join(members[m].label for m in sorted(others))
                what = f"{names} trained rows of single tokens in {module}, and {theirs} has {how}: a row is a value, "
                what += "which nothing has seen beside that"
                yield Problem(KEY, what, "use one of them at a time", members[max(own | others)].label)


def rows_without_sum(label: str, method: str) -> Problem:
    what = f"{label} trained rows of single tokens ({KEY}), which add up and are not a matrix for {method} to work on"
    return Problem(KEY, what, "compose the sum: leave out --method", label)


def differ_on_tied(rows: Iterable[TokenRows], base: Base | None) -> bool:
    """Whether rows make the two of a tied pair, embedding and head, different."""
    if base is None or not (base.tied_embeddings and base.input_embedding and base.output_embedding):
        return False
    found: dict[str | None, set[Any]] = {base.input_embedding: set(), base.output_embedding: set()}
    for row in rows:
        if row.module in found:
            found[row.module].add((row.member, row.tokens, row.tensor.name, row.weight))
    return len({frozenset(own) for own in found.values()}) > 1


def peft_rows(plan: StackPlan) -> dict[str, list[TokenRows]]:
    """The rows that a PEFT checkpoint of the whole stack holds, by module: without those of a head that PEFT ties.

    Raises:
        Incompatible: PEFT would load them as other rows than these.
    """
    found: dict[str, list[TokenRows]] = {}
    for rows in plan.token_rows:
        found.setdefault(rows.module, []).append(rows)
    base = plan.base
    if base is None or not base.ties_rows or base.input_embedding not in found:
        return found
    head = base.output_embedding or ""
    if not differ_on_tied(plan.token_rows, base):
        found.pop(head, None)
    elif all_tokens(found.get(head, ())) in ([], all_tokens(found[base.input_embedding])):
        raise Incompatible(
            f"{plan.expression} has other rows of single tokens in {base.input_embedding} than in {head}, which "
            f"'{base.name}' ties, and PEFT would take those of one for both",
            hint="export with --format model",
        )
    return found


def all_tokens(rows: Iterable[TokenRows]) -> list[int]:
    """The tokens of several members' rows, one after another."""
    return [token for own in rows for token in own.tokens]


def _listed(tokens: Iterable[int]) -> str:
    return listed(list(map(str, sorted(tokens))), _NAMED)
