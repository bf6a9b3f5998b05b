"""A finished adapter becomes a version: written beside its place, read back, registered whole or not at all."""

from __future__ import annotations

import functools
import importlib.metadata
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from peft import PeftModel
from torch import Tensor

from stackctl import __version__
from stackctl.core.errors import VerificationFailed
from stackctl.core.provenance import DataSource, Distilled, Moved, Run
from stackctl.core.schema import AdapterInfo, AdapterVersion, CheckpointMember
from stackctl.engine.data.chat_template import shown_date
from stackctl.engine.models import StackedModel
from stackctl.engine.records.read import RecordStream
from stackctl.engine.tensors import MemberTensors, all_finite
from stackctl.engine.training import distributed as group
from stackctl.engine.training.adapter import save_adapter
from stackctl.engine.training.dataset import Corpus
from stackctl.engine.training.state import Counters, not_finite
from stackctl.engine.training.trainer import TrainerParts
from stackctl.jobs import ranks
from stackctl.jobs.job import PreparedJob
from stackctl.jobs.run_problems import problems_of_run
from stackctl.jobs.teacher import Teacher
from stackctl.lora.checkpoint import INFO, TEMPLATE_FILE, read_checkpoint
from stackctl.plan.build import plan_stack
from stackctl.plan.stack_plan import PlanMember
from stackctl.registry.base_models import EMBEDDED_HUB_ID
from stackctl.registry.store import Registry
from stackctl.registry.versions import add_version, entry_of, find_same_version
from stackctl.render.loss_curve import LOG, PICTURE, read_curve, render_curve_svg
from stackctl.storage import atomic


@dataclass(frozen=True)
class FinishedRun:
    """What a proved run leaves to be registered: the adapter, what it was trained on, and how that went."""

    model: PeftModel
    state: dict[str, Tensor]
    tokenizer: Any
    corpus: Corpus
    outcome: Run
    counters: Counters
    trained_tokens: list[str]


def describe_run(prepared: PreparedJob, stacked: StackedModel, corpus: Corpus, parts: TrainerParts, how: str) -> Run:
    """What the entry says of a run; ``how`` the stack was frozen."""
    counters, held_out = parts.state.counters, parts.held_out
    return Run(
        steps=len(counters.curve),
        epochs=round(counters.tokens / max(corpus.encoded.tokens, 1), 4),
        loss=counters.loss,
        tokens=counters.tokens,
        supervised_tokens=counters.supervised_tokens,
        seconds=round(counters.seconds, 3),
        frozen=how,  # type: ignore[arg-type]
        frozen_error=stacked.rounding_error if how == "fold" else None,
        initial_seed=prepared.initial_seed,
        dtype=("nf4, " if prepared.job.dtype == "nf4" else "")
        + str(stacked.model.dtype).removeprefix("torch.")
        + (", bfloat16 autocast" if parts.bfloat16 else ""),
        device=stacked.device.type,
        processes=ranks.world_size(),
        eval_loss_before=held_out.evaluations[0]["eval_loss"] if held_out else None,
        eval_loss=held_out.kept["eval_loss"] if held_out else None,
        kept_step=int(held_out.kept["step"]) if held_out else None,
        stopped_early=held_out is not None and held_out.is_over,
        eval_accuracy=held_out.kept.get("eval_accuracy") if held_out else None,
        eval_margin=held_out.kept.get("eval_margin") if held_out else None,
        accuracy=counters.accuracy,
        margin=counters.margin,
        batch_size=parts.cut.records,
        gradient_accumulation=parts.cut.count,
        gradient_checkpointing=parts.cut.checkpointing or group.checkpoints_itself(),
        template_date=shown_date(stacked.tokenizer),
    )


def register_version(
    prepared: PreparedJob, registry: Registry, finished: FinishedRun, *, resume: bool
) -> AdapterVersion:
    """Write the checkpoint beside its place, read it back, and register it.

    A run that is resumed may have been killed right after it was registered: then it is not registered twice.

    Raises:
        Failed: the last step made a value that is no number.
        VerificationFailed: what was written is not whole.
    """
    counters = finished.counters
    if broken := [name for name, tensor in finished.state.items() if not all_finite(tensor)]:
        raise not_finite(f"after the last step {broken[0]} holds values that are not finite numbers")
    with atomic.staging_directory(registry.root / "weights") as staged:
        save_adapter(finished.model, staged, finished.state)
        finished.tokenizer.save_pretrained(staged)
        points = sorted([*counters.curve, *counters.evaluations], key=lambda point: point["step"])
        (staged / LOG).write_text("".join(json.dumps(point) + "\n" for point in points))
        digest = _check_saved(prepared, staged)
        return (resume and find_same_version(registry, prepared.name, digest, prepared.stack)) or add_version(
            registry,
            prepared.name,
            lambda number: _entry(prepared, registry, staged, number, finished),
            staged,
            prepared.job.description or None,
        )


def _check_saved(prepared: PreparedJob, staged: Path) -> str:
    """What was written is a whole adapter that fits the base and holds numbers. Returns its digest.

    Raises:
        VerificationFailed: it is not.
    """
    checkpoint = read_checkpoint(staged)
    member = PlanMember(prepared.name, 1.0, checkpoint, prepared.name)
    plan = plan_stack(prepared.base, [member])
    if plan.errors:
        raise VerificationFailed("the adapter was not saved whole: " + "; ".join(p.message for p in plan.errors))
    with MemberTensors(plan) as tensors:
        for module in plan.modules.values():
            tensors.factors(module)
        for rows in plan.token_rows:
            tensors.of(rows.member, rows.tensor)
    return checkpoint.digest()


def _entry(
    prepared: PreparedJob, registry: Registry, staged: Path, number: int, finished: FinishedRun
) -> AdapterVersion:
    corpus = finished.corpus
    checkpoint = read_checkpoint(staged)
    base, stack = prepared.base, prepared.stack
    used_with = "+".join([*prepared.trained_on, f"{prepared.name}@{number}"])
    info = AdapterInfo(
        adapter=prepared.name,
        version=number,
        base=base.name,
        base_fingerprint=base.fingerprint,
        base_hub_id=base.hub_id or (EMBEDDED_HUB_ID if base.kind == "wheel" else None),
        trained_on=[
            CheckpointMember(
                adapter=m.adapter.name, version=m.version.version, digest=m.version.digest, weight=m.weight
            )
            for m in stack.members
        ],
        chat_template=TEMPLATE_FILE if (staged / TEMPLATE_FILE).is_file() else None,
        usage=f"stackctl generate {used_with}",
        created_by=f"stackctl {__version__}",
    )
    if picture := render_curve_svg({f"{prepared.name}@{number}": read_curve(staged)}):
        atomic.write_atomic(staged / PICTURE, picture)
    atomic.write_atomic(staged / INFO, json.dumps(msgspec.to_builtins(info), indent=2, ensure_ascii=False) + "\n")
    path = registry.relative_weights_path(prepared.name, number)
    return msgspec.structs.replace(
        entry_of(number, path, checkpoint, base, prepared.trained_on),
        from_=prepared.beginning.label if prepared.beginning else None,
        moved=Moved(**finished.counters.moved) if finished.counters.moved else None,
        distilled=_distilled(prepared.teacher, finished) if prepared.teacher else None,
        data=_source(prepared.data, corpus.records),
        eval_data=_source(prepared.eval_data, corpus.held_out) if prepared.eval_data and corpus.held_out else None,
        settings=msgspec.to_builtins(prepared.job.settings()),
        run=finished.outcome,
        problems=problems_of_run(
            prepared.job, finished.counters.losses, base.vocabulary_size, finished.outcome.kept_step
        ),
        trained_tokens=finished.trained_tokens,
        versions=_versions() | {"stackctl": __version__},
    )


@functools.cache
def _versions() -> dict[str, str]:
    """Of the libraries of a training: each is read out of a long text."""
    return {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")}


def _distilled(teacher: Teacher, finished: FinishedRun) -> Distilled:
    found = {point["step"]: point for point in finished.counters.evaluations}
    first, kept = found.get(0, {}), found.get(finished.outcome.kept_step or 0, {})
    return Distilled(
        teacher=teacher.label,
        system=teacher.system_digest,
        divergence_before=first.get("eval_loss"),
        divergence_before_error=first.get("eval_error"),
        divergence=kept.get("eval_loss"),
        divergence_error=kept.get("eval_error"),
        loss_before=first.get("eval_cross_entropy"),
        loss=kept.get("eval_cross_entropy"),
    )


def _source(path: str, records: RecordStream) -> DataSource:
    return DataSource(path=path, sha256=records.sha256, records=records.count, format=records.format)
