"""A stack as llama.cpp serves it: GGUF adapters beside the base, each with a scale for a request.

Of a plain sum every member is one adapter, whose scale is the member's weight, so that all sums of the same members
share their files. A member with weights by layer is exported with them; what another method made is exported whole.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from stackctl.core import Say
from stackctl.plan.build import plan_stack
from stackctl.plan.lint import check_beside_base
from stackctl.plan.methods import SUM
from stackctl.plan.stack_plan import StackPlan
from stackctl.registry.export_cache import exported

Scaled = dict[Path, float]
"""The files of a stack's adapters, and how often each counts."""


def scaled_adapters(plan: StackPlan, base: Path, gguf: Path, say: Say) -> Scaled:
    """A stack's adapters in the cache, exported now if they are not there yet. ``base`` is the base's folder.

    Raises:
        Incompatible, VerificationFailed: llama.cpp cannot run it, a tensor is damaged, or the base is another one.
    """
    check_beside_base("gguf", plan)
    scaled: Scaled = {}
    for part, scale in _parts(plan):
        folder = exported(part, "gguf", partial(_write, part, base, gguf, say))
        file = next(folder.glob("*.gguf"))
        scaled[file] = scaled.get(file, 0.0) + scale
    return scaled


def _write(part: StackPlan, base: Path, gguf: Path, say: Say, out: Path) -> None:
    say(f"exporting {part.expression} once for llama.cpp")
    from stackctl.engine.export.gguf import export_gguf  # with torch, which nothing else of llama.cpp's needs

    export_gguf(part, base, out, base_gguf=gguf)


def _parts(plan: StackPlan) -> list[tuple[StackPlan, float]]:
    """What is exported by itself, and the scale of each."""
    if not plan.modules:
        return []
    if plan.method != SUM:
        return [(plan, 1.0)]
    parts = []
    for member in plan.members:
        if not member.is_used:
            continue
        own, scale = (member, 1.0) if member.layer_weights else (replace(member, weight=1.0), member.weight)
        part = plan_stack(plan.base, [replace(own, trained_on=())])
        if part.modules:
            parts.append((part, scale))
    return parts
