"""stackctl extract"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from stackctl.cli.command import REGISTRY, Context, command
from stackctl.cli.shared_options import DESCRIPTION, NEW_ADAPTER, BaseOption
from stackctl.core.errors import StackctlError, Usage, attempt, raise_all
from stackctl.core.provenance import Extracted
from stackctl.lora.checkpoint import read_checkpoint
from stackctl.lora.target_modules import compact_names
from stackctl.plan.build import plan_stack
from stackctl.plan.stack_plan import PlanMember
from stackctl.registry.base_entries import resolve_base
from stackctl.registry.base_models import parse_source
from stackctl.registry.versions import NewVersion, check_adapter_name, register_checkpoint, version_facts
from stackctl.render.output import Result
from stackctl.storage import atomic

if TYPE_CHECKING:
    from stackctl.engine.to_lora.extraction import Extraction

_EXAMPLES = """\
stackctl extract chat --base smollm2 --tuned ./my-full-finetune --rank 32
stackctl extract chat --base smollm2 --tuned me/my-full-finetune --rank auto --tolerance 0.1"""


_MUCH = 0.5
"""The share of a change from which on its loss is remarked on; strangers lose more at any usual rank."""


@command("extract", example=_EXAMPLES, panel=REGISTRY)
def extract(
    context: Context,
    name: NEW_ADAPTER,
    tuned: Annotated[
        str, typer.Option(help="The fine-tuned model: a folder or a Hub id.", metavar="SOURCE", show_default=False)
    ],
    base: BaseOption = None,
    rank: Annotated[str, typer.Option(help="Rank of each layer's pair, or auto.", metavar="N")] = "16",
    tolerance: Annotated[
        float | None,
        typer.Option(help="With --rank auto: the share of a layer's change that may be lost; 0.1 if left out."),
    ] = None,
    description: DESCRIPTION = "",
) -> Result:
    """Make a LoRA adapter of the difference between a full fine-tune and its base."""
    registry = context.registry
    problems: list[StackctlError] = []
    attempt(problems, check_adapter_name, registry, name)
    found_base = attempt(problems, resolve_base, registry, base)
    attempt(problems, parse_source, "tuned", tuned)
    attempt(problems, _check_tolerance, rank, tolerance)
    number = attempt(problems, _rank, rank)
    raise_all(problems)
    from stackctl.engine.quick_imports import import_peft, import_transformers

    import_transformers()
    import_peft()
    from stackctl.engine.to_lora import extraction
    from stackctl.engine.to_lora.low_rank import Truncation

    say = context.output.status
    model, folder = extraction.find_tuned(found_base, tuned, registry, say)
    wanted = Truncation(number, None if number else tolerance or 0.1)
    found = extraction.extract(found_base, context.base_folder(found_base), model, folder, wanted)
    told = Extracted(
        source=tuned, revision=model.revision, fingerprint=model.fingerprint, relative_error=found.relative_error,
        errors=found.errors, saved=found.saved_modules, left_out=found.left_out,
    )  # fmt: skip
    with atomic.staging_directory(registry.root / "weights") as staged:
        found.write(staged, found_base, {})
        plan_stack(found_base, [PlanMember(name, 1.0, read_checkpoint(staged), name)]).check()
        new = NewVersion(name, found_base, [], description)
        version = register_checkpoint(registry, new, staged, extracted=told)
    label = f"{name}@{version.version}"
    data = {
        **version_facts(registry, name, version, found_base.name),
        "rank": found.rank,
        "relative_error": found.relative_error,
        "modules": len(found.pairs),
        "saved": found.saved_modules,
        "left_out": found.left_out,
    }
    text = (
        f"extracted {label}: rank {found.rank} on {len(found.pairs)} modules, "
        f"{found.relative_error:.2%} of the change is lost"
    )
    return Result(data, label, text, notes=tuple(_notes(found, f"{tuned} did not grow out of {found_base.name}")))


def _notes(found: Extraction, else_: str) -> Iterator[str]:
    """What is remarkable about an extraction; ``else_`` is why much may be lost at any rank."""
    if found.saved:
        yield f"kept whole: {', '.join(compact_names(found.saved_modules))}"
    if found.left_out:
        yield f"changed and not kept: {', '.join(compact_names(found.left_out))}"
    if found.relative_error > _MUCH:
        yield f"most of the change is lost: raise --rank, or {else_}"


def _rank(text: str) -> int | None:
    """A rank, or None for auto."""
    if text == "auto":
        return None
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= 65536:
        raise Usage(f"--rank {text} is not a rank", hint="give a number from 1 to 65536, or auto")
    return int(text)


def _check_tolerance(rank: str, tolerance: float | None) -> None:
    if tolerance is not None and not 0 < tolerance < 1:
        raise Usage(f"--tolerance {tolerance:g} is not between 0 and 1", hint="give a share, for example 0.1")
    if tolerance is not None and rank != "auto":
        raise Usage("--tolerance needs --rank auto", hint="leave out one of the two")
