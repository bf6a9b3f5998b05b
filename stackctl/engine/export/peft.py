"""A stack as one plain LoRA that PEFT, vLLM and converters read alike."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from stackctl.core.errors import Incompatible, VerificationFailed
from stackctl.engine.safetensors_writer import SAFETENSORS_NAMES, SafetensorsWriter
from stackctl.lora.checkpoint import CONFIG, TEMPLATE_FILE, WEIGHTS, read_checkpoint, templates_of
from stackctl.lora.lora_config import PEFT_PREFIX, factor_names, plain_lora_config
from stackctl.lora.naming import is_unread
from stackctl.lora.target_modules import expand_modules
from stackctl.lora.target_parameters import wrapped_names
from stackctl.plan.build import plan_stack
from stackctl.plan.methods import SUM
from stackctl.plan.stack_plan import PlanMember, StackPlan
from stackctl.plan.token_rows import KEY, all_tokens, peft_rows
from stackctl.storage import atomic


def export_peft(
    plan: StackPlan, out: Path, *, dtype: str = "float32", base: Callable[[], Path] | None = None
) -> dict[str, Any]:
    """Write a stack as one plain LoRA: alpha = rank on every module, so that every reader scales it by one.

    The base is never loaded, and no more than one module is in memory at a time. Rows of single tokens are written as
    the values that they have in the sum; for those with a weight other than one the base's own are read from its
    folder, which ``base`` gives.

    Returns:
        ``rank``; ``max_relative_error``, the worst module's ‖written - exact sum‖ / ‖exact sum‖; ``exact``: a sum in
        float32, which loses nothing; ``digests``, the ``sha256:<hex>`` of the files that were hashed on their way.

    Raises:
        Incompatible, VerificationFailed, Usage: the plan has problems, a tensor is not finite, ``out`` is taken.
    """
    plan.check()
    if not plan.modules:
        what = "changes only rows of single tokens, and a LoRA" if plan.token_rows else "adds nothing to the base:"
        hint = "--format model" if plan.token_rows else "--format model writes the base itself"
        raise Incompatible(f"{plan.expression} {what} there is no adapter to write", hint=hint)
    if plan.replacements:
        raise Incompatible(f"{plan.brought}, which a plain LoRA cannot hold", hint="--format model")
    peft_rows(plan)
    if lost := [name for name in plan.modules if plan.base and is_unread(name, plan.base)]:
        raise Incompatible(
            f"{plan.expression} changes {lost[0]}, and PEFT does not find a LoRA there again when it loads it",
            hint="--format model",
        )
    with atomic.staging_directory(out.parent) as staged:
        ranks = _ranks(plan)
        error, digest = _write_weights(plan, ranks, staged / WEIGHTS, SAFETENSORS_NAMES[dtype], base)
        _write_config(plan, ranks, staged / CONFIG)
        if plan.base and plan.base.chat_template is None and (templates := templates_of(plan.folders)):
            atomic.write_atomic(staged / TEMPLATE_FILE, templates[0][1])
        _check_written(plan, ranks, staged)
        atomic.publish_directory(staged, out)
    return {
        "rank": max(ranks.values()),
        "max_relative_error": error,
        "exact": dtype == "float32" and plan.method == SUM,
        "digests": {WEIGHTS: digest},
    }


def _ranks(plan: StackPlan) -> dict[str, int]:
    """The rank of every module's pair."""
    if plan.options.rank != "auto":
        return {name: plan.rank_of(module) for name, module in plan.modules.items()}
    from stackctl.engine.merging import found_ranks

    return found_ranks(plan)


def _layout(plan: StackPlan, ranks: dict[str, int]) -> list[tuple[str, tuple[int, int]]]:
    """Every tensor with its shape, in the order of writing: two for each module, then rows of single tokens."""
    known = expand_modules(plan.base.modules) if plan.base else {}
    wrapped = wrapped_names([m.name for m in plan.modules.values() if m.is_experts], known)
    found: list[tuple[str, tuple[int, int]]] = []
    for name, module in plan.modules.items():
        rank = ranks[name] * module.experts
        rows, columns = module.shape if module.type != "Embedding" else module.shape[::-1]
        a, b = factor_names(f"{PEFT_PREFIX}{wrapped.get(name, name)}", module.type)
        found += [(a, (rank, columns)), (b, (rows, rank))]
    for name, trained in peft_rows(plan).items():
        shape = len(all_tokens(trained)), trained[0].tensor.shape[1]
        found.append((f"{PEFT_PREFIX}{name}.token_adapter.trainable_tokens_delta", shape))
    return found


def _write_weights(
    plan: StackPlan, ranks: dict[str, int], path: Path, dtype: str, base: Callable[[], Path] | None
) -> tuple[float, str]:
    """Stream the factors module by module, then rows of single tokens.

    Returns the worst module's relative error against the exact sum, and the file's digest.
    """
    layout, worst = _layout(plan, ranks), 0.0
    with SafetensorsWriter(path, [(name, dtype, shape) for name, shape in layout]) as writer:
        names = (name for name, _ in layout)
        for tensors, error in itertools.chain(_pairs(plan, dtype), _rows(plan, dtype, base)):
            for data in tensors:
                writer.write(next(names), data)
            worst = max(worst, error)
    return worst, writer.check()


def _rows(plan: StackPlan, dtype: str, base: Callable[[], Path] | None) -> Iterator[tuple[list[memoryview], float]]:
    """The rows of single tokens as bytes, module by module, and their relative error."""
    if not plan.token_rows:
        return
    from stackctl.engine.token_rows import OwnRows, base_rows, written_rows

    def own() -> OwnRows:
        assert base is not None, "whoever exports weighted rows, or in half precision, knows where the base is"
        return base_rows(plan, base())

    for data, error in written_rows(plan, dtype, own):
        yield [data], error


def _pairs(plan: StackPlan, dtype: str) -> Iterator[tuple[Sequence[memoryview], float]]:
    """Every module's A and B as bytes, and their relative error: none of a sum in float32, which needs no torch."""
    if dtype == "F32" and plan.method == SUM:
        from stackctl.engine.export.concatenation import Concatenation

        with Concatenation(plan) as exact:
            yield from ((exact.pair(module), 0.0) for module in plan.modules.values())
    else:
        from stackctl.engine.merging import made_pairs
        from stackctl.engine.tensors import TORCH_DTYPES, tensor_bytes

        for module, pair, error in made_pairs(plan, TORCH_DTYPES[dtype]):
            yield [tensor_bytes(module.name, factor) for factor in pair], error


def _write_config(plan: StackPlan, ranks: dict[str, int], path: Path) -> None:
    base = plan.base
    name = (base.hub_id or base.source) if base else None
    config = {**plain_lora_config(*plan.peft_names(ranks)), "base_model_name_or_path": name, "inference_mode": True}
    if plan.token_rows:
        config[KEY] = {module: all_tokens(rows) for module, rows in peft_rows(plan).items()}
    atomic.write_atomic(path, json.dumps(config, indent=2, sort_keys=True) + "\n")


def _check_written(plan: StackPlan, ranks: dict[str, int], folder: Path) -> None:
    """Read the folder back as any other checkpoint and compare it with the plan, module by module.

    Raises:
        VerificationFailed: a shape or a rank is not what was planned.
    """
    again = plan_stack(plan.base, [PlanMember("export", 1.0, read_checkpoint(folder))])
    planned = {name: (module.shape, ranks[name]) for name, module in plan.modules.items()}
    written = {name: (module.shape, module.rank) for name, module in again.modules.items()}
    rows = [{(r.module, token) for r in own.token_rows for token in r.tokens} for own in (plan, again)]
    if again.errors or planned != written or rows[0] != rows[1]:
        reasons = "; ".join(p.message for p in again.errors) or "modules or ranks differ"
        raise VerificationFailed(f"what was written is not what was planned: {reasons}")
