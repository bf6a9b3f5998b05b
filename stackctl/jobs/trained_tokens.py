"""``--train-tokens``: what it asks for, and what of it can be told before anything is loaded."""

from __future__ import annotations

from stackctl.core.errors import Incompatible, Usage
from stackctl.core.schema import Base
from stackctl.core.train_job import TrainJob
from stackctl.lora.target_modules import named_targets
from stackctl.plan.stack_plan import StackPlan
from stackctl.plan.token_rows import differ_on_tied

AUTO, NONE = "auto", "none"


def parse_tokens(value: list[str] | str) -> list[str] | str:
    """``auto``, ``none``, or tokens: a list, or a text with commas between them.

    Raises:
        Usage: it names nothing.
    """
    if isinstance(value, str) and value.strip() in (AUTO, NONE):
        return value.strip()
    tokens = value.split(",") if isinstance(value, str) else value
    found = [token for token in dict.fromkeys(tokens) if token]
    if not found:
        raise Usage("--train-tokens names no token", hint="auto, none, or tokens: --train-tokens '<|im_end|>'")
    return found


def asks(value: list[str] | str) -> bool:
    """Whether rows of any token may be trained."""
    return parse_tokens(value) != NONE


def token_modules(base: Base) -> list[str]:
    """Where PEFT has rows for a token: the embedding, and the head where it is another to PEFT."""
    head = None if base.ties_rows else base.output_embedding
    return [name for name in (base.input_embedding, head) if name]


def check_tokens(job: TrainJob, plan: StackPlan, base: Base, begins: StackPlan | None = None) -> None:
    """Whether rows can be trained beside what the job and its frozen stack do to the same modules.

    ``begins`` is the adapter that the job begins at; rows that it trained are trained on.

    Raises:
        Usage, Incompatible: they cannot.
    """
    chosen = named_targets(job.target_modules, base)
    for rows in plan.token_rows:
        if rows.module in chosen:
            label = plan.members[rows.member].label
            raise Incompatible(
                f"--target-modules puts a LoRA on {rows.module}, of which {label} trained rows of single tokens: no "
                "stack can hold both",
                hint=f"leave {rows.module} out, or train on a stack without it",
            )
    begun = begins.token_rows if begins else ()
    if not asks(job.train_tokens) and not begun:
        return
    if not base.input_embedding:
        raise Incompatible(
            f"the entry of '{base.name}' does not say which module is its embedding",
            hint=f"register it again: stackctl base rm {base.name}, then stackctl base add {base.name} SOURCE",
        )
    rows_in = {*token_modules(base), *([base.output_embedding] if base.tied_embeddings else [])}
    if begins and (odd := sorted({rows.module for rows in begun} - rows_in) or differ_on_tied(begun, base)):
        where = odd[0] if isinstance(odd, list) else base.output_embedding
        raise Incompatible(
            f"--from {begins.members[0].label}: its rows of single tokens in {where} cannot be begun at",
            hint="leave out --from",
        )
    ends = {base.input_embedding, base.output_embedding} - {None}
    if both := sorted(chosen & ends):
        raise Usage(
            f"--train-tokens trains rows of {both[0]}, on which --target-modules puts a LoRA: PEFT cannot do both",
            hint="leave out one of the two",
        )
    standing = {name: plan.members[m.factors[0].member].label for name, m in plan.modules.items() if name in ends}
    for replacement in plan.replacements:
        if (name := replacement.parameter.removesuffix(".weight")) in ends:
            standing[name] = plan.members[replacement.member].label
    for name, label in standing.items():
        raise Incompatible(
            f"--train-tokens trains rows of {name}, which {label} changes as a whole: a row is a value, and would hold "
            "its change as well",
            hint="leave out --train-tokens, or train on a stack without it",
        )
