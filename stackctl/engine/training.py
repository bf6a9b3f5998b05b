"""Train one adapter on a frozen, active stack, prove it, and register it whole or not at all."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import TrainingArguments, set_seed

from stackctl import __version__, files
from stackctl.bases import EMBEDDED_HUB_ID
from stackctl.checkpoint import INFO, describe_lora, read_checkpoint
from stackctl.engine import data as data_module
from stackctl.engine import proofs
from stackctl.engine.data import Encoded, Example
from stackctl.engine.evaluation import score_examples
from stackctl.engine.models import LIVE, StackedModel, attach_live, computes_in_bfloat16, evaluating, load_base
from stackctl.engine.records import RecordSet, read_records
from stackctl.engine.tensors import MemberTensors
from stackctl.engine.trainer import ADAPTER, Counters, StackTrainer, save_adapter, supervised_logits
from stackctl.errors import Failed, Incompatible, Interrupted, Usage, VerificationFailed
from stackctl.jobs import PreparedJob, RunFolder, run_folder
from stackctl.modules import ALL_LINEAR, expand_modules, expected_targets
from stackctl.plan import PlanMember, plan_stack
from stackctl.registry import Registry, now
from stackctl.schema import AdapterInfo, AdapterVersion, CheckpointMember, DataSource, ModuleShape, Run, TrainJob

FOLD_TOLERANCE = 1e-3
"""Largest share of the frozen deltas that folding may lose to rounding before ``auto`` keeps the stack live."""
_PACKING_TOLERANCE = 1e-3

Say = Callable[[str], None]
Progress = Callable[[int, int, Counters], None]


@dataclass(frozen=True)
class Trained:
    """A finished run."""

    version: AdapterVersion
    counters: Counters
    trainable_parameters: int
    eval_before: float | None
    eval_after: float | None


@dataclass(frozen=True)
class Corpus:
    """A job's data, read and tokenised."""

    records: RecordSet
    encoded: Encoded
    rows: list[list[Example]]
    """What one place of a micro-batch holds: one record, or a packed sequence of several."""
    evaluation: Encoded | None


def read_corpus(prepared: PreparedJob, tokenizer: Any, say: Say) -> Corpus:
    """Read and tokenise a job's data, and say what a person should know about it.

    Raises:
        NotFound, Usage: it is missing, malformed, or nothing in it can be learned from.
    """
    job, context = prepared.job, prepared.base.context_length
    length = min(job.max_length, context or job.max_length)
    if length < job.max_length:
        say(f"--max-length {job.max_length} is more than {prepared.base.name} reads at once: {length} is used")
    records = read_records(prepared.data)
    if job.pack and records.format != "text":
        raise Usage(f"--pack joins text records, and {prepared.data} holds {records.format}", hint="leave out --pack")
    encoded = data_module.encode(records, tokenizer, max_length=length, split_long=job.pack)
    evaluation = None
    if prepared.eval_data:
        evaluation = data_module.encode(read_records(prepared.eval_data), tokenizer, max_length=length)
    for note in encoded.notes:
        say(f"note: {note}")
    if encoded.truncated:
        say(f"note: {encoded.truncated} of {records.count} records were cut to {length} tokens (--max-length)")
    if encoded.unsupervised:
        lines = ", ".join(str(line) for line in encoded.unsupervised[:5])
        say(f"note: {len(encoded.unsupervised)} records have nothing to learn from within {length} tokens: {lines}")
    share = encoded.supervised_tokens / max(encoded.tokens, 1)
    say(f"{records.count} {records.format} records, {encoded.tokens:,} tokens, {share:.0%} of them supervised")
    rows = data_module.pack(encoded.examples, length) if job.pack else [[example] for example in encoded.examples]
    return Corpus(records, encoded, rows, evaluation)


def train_adapter(prepared: PreparedJob, registry: Registry, *, resume: bool, say: Say, progress: Progress) -> Trained:
    """Train, prove and register one adapter version.

    Raises:
        VerificationFailed: a proof failed; nothing is registered.
        Failed, Interrupted: the loss is no number, the disk is full, Ctrl-C; saves are kept.
    """
    registry.check_digests(prepared.stack.members)
    _check_precision(prepared)
    stacked = load_base(prepared.base, registry, dtype=prepared.job.dtype, say=say)
    if data_module.ensure_chat_template(stacked.tokenizer):
        say(f"note: the base '{prepared.base.name}' has no chat template: ChatML is used")
    corpus = read_corpus(prepared, stacked.tokenizer, say)
    run = _open_run(prepared, registry, corpus, resume)
    set_seed(prepared.job.seed)
    probe_tokens = proofs.probe_tokens(corpus.encoded.examples[0].input_ids)
    bare = proofs.probe(stacked.model, probe_tokens)
    how = _freeze(stacked, prepared, say)
    model = _attach_new(stacked, prepared, live=how == "live")
    live = LIVE if how == "live" else None
    trainable = proofs.check_trainable(model)
    with proofs.new_adapter_off(model, live):
        frozen = proofs.probe(model, probe_tokens)
    if prepared.plan.members:
        effect = proofs.check_active(bare, frozen, prepared.plan.expression)
        say(f"{prepared.plan.expression} is frozen ({how}) and active: it moves the logits by {effect:.1%}")
    counters = Counters()
    bfloat16 = computes_in_bfloat16(prepared.job.dtype, stacked.device, stacked.model)
    as_rows = _must_separate(model, corpus.encoded.examples)
    eval_before = score_examples(model, corpus.evaluation.examples).loss if corpus.evaluation else None
    _run_trainer(prepared, model, corpus, run, counters, as_rows, bfloat16, resume, progress)
    with proofs.new_adapter_off(model, live):
        proofs.check_unchanged(frozen, proofs.probe(model, probe_tokens))
    proofs.check_trainable(model)
    registry.check_digests(prepared.stack.members, fresh=True)
    eval_after = score_examples(model, corpus.evaluation.examples).loss if corpus.evaluation else None
    outcome = Run(
        steps=len(counters.curve),
        epochs=round(counters.tokens / max(corpus.encoded.tokens, 1), 4),
        loss=counters.loss,
        tokens=counters.tokens,
        supervised_tokens=counters.supervised_tokens,
        seconds=round(counters.seconds, 3),
        frozen=how,  # type: ignore[arg-type]
        frozen_error=stacked.rounding_error if how == "fold" else None,
        dtype=str(stacked.model.dtype).removeprefix("torch.") + (", bfloat16 autocast" if bfloat16 else ""),
        device=stacked.device.type,
        eval_loss=eval_after,
    )
    version = _register(prepared, registry, model, stacked.tokenizer, corpus, outcome, counters)
    shutil.rmtree(run.path, ignore_errors=True)
    return Trained(version, counters, trainable, eval_before, eval_after)


def _check_precision(prepared: PreparedJob) -> None:
    if prepared.job.dtype == "nf4":
        raise Incompatible(
            "a base quantised to nf4 is not supported by this version",
            hint="use --dtype bfloat16, which needs two bytes for each parameter",
        )


def _open_run(prepared: PreparedJob, registry: Registry, corpus: Corpus, resume: bool) -> RunFolder:
    """The folder for this run's saves; without ``--resume`` an older unfinished run of that name is dropped."""
    run = run_folder(registry, prepared.name)
    signature = prepared.signature(corpus.records.sha256)
    if resume and run.checkpoints:
        known = run.signature
        changed = [key for key, value in signature.items() if known.get(key) != value]
        if changed:
            raise Usage(
                f"the unfinished run of '{prepared.name}' had other {', '.join(changed)}",
                hint="give the same name, data and flags, or leave out --resume to start again",
            )
    elif run.path.exists():
        files.remove_tree(run.path)
    run.begin(signature)
    return run


def _freeze(stacked: StackedModel, prepared: PreparedJob, say: Say) -> str:
    """Fold the frozen stack into the base, or leave it to be attached live. Returns none, fold or live."""
    if not prepared.plan.members:
        return "none"
    if prepared.job.frozen == "live" and prepared.plan.modules:  # nothing at all is folded, for the proof to find
        return "live"
    stacked.use(prepared.plan)
    if prepared.job.frozen == "fold" or stacked.rounding_error <= FOLD_TOLERANCE:
        return "fold"
    say(f"folding would lose {stacked.rounding_error:.1%} of the frozen stack to rounding: it is kept live")
    stacked.restore()
    return "live"


def _attach_new(stacked: StackedModel, prepared: PreparedJob, *, live: bool) -> PeftModel:
    """Put the new adapter on the model, with the frozen stack beside it if it is live; only the new one trains."""
    job, base = prepared.job, prepared.base
    modules = expand_modules(base.modules)
    targets = prepared.target_modules
    chosen = expected_targets({"target_modules": targets}, modules, base.output_embedding) or set()
    if targets == ALL_LINEAR:  # by name: left to itself, PEFT would add the experts' parameters of a mixture
        targets = _names_for(chosen, modules)
    config = LoraConfig(
        r=job.rank,
        lora_alpha=_whole(job.effective_alpha()),
        lora_dropout=job.dropout,
        target_modules=targets,
        use_rslora=job.use_rslora,
        fan_in_fan_out=any(modules[name].type == "Conv1D" for name in chosen),
        task_type="CAUSAL_LM",
    )
    stacked.model.name_or_path = base.hub_id or str(stacked.folder)
    model: PeftModel = get_peft_model(stacked.model, config, adapter_name=ADAPTER)
    if live:
        attach_live(model, prepared.plan)
        model.base_model.set_adapter([LIVE, ADAPTER])
        for name, parameter in model.named_parameters():
            if f".{LIVE}." in name or name.endswith(f".{LIVE}"):
                parameter.requires_grad_(False)
    return model


def _names_for(chosen: set[str], modules: dict[str, ModuleShape]) -> list[str]:
    """The last parts of some modules' names where those choose just these modules, else the full names."""
    short = sorted({name.rpartition(".")[2] for name in chosen})
    return short if expected_targets({"target_modules": short}, modules, None) == chosen else sorted(chosen)


def _whole(number: float) -> int | float:
    return int(number) if number == int(number) else number


def _must_separate(model: PeftModel, examples: list[Example]) -> bool:
    """Whether this model mixes documents that share a row, so that records must run one by one.

    Most models derive block-diagonal attention from restarting positions; this looks instead of believing.
    """
    if len(examples) < 2:
        return False
    pair = [Example(e.input_ids[:48], [-100, *e.input_ids[1:48]]) for e in examples[:2]]
    device = next(model.parameters()).device

    def logits(rows: list[Example]) -> torch.Tensor:
        batch = {key: value.to(device) for key, value in data_module.collate(rows).items()}
        return supervised_logits(model, batch).float()

    with evaluating(model):
        together = logits(pair)
        apart = torch.cat([logits([example]) for example in pair])
    return proofs.difference(together, apart) > _PACKING_TOLERANCE


def _warmup_steps(job: TrainJob, rows: int) -> int:
    """Steps of rising rate, always fewer than there are: a run of one step that only warmed up would learn nothing."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    batches = -(-rows // (job.batch_size * processes))
    steps = job.max_steps or math.ceil(-(-batches // job.gradient_accumulation) * job.epochs)
    wanted = int(job.warmup) if job.warmup >= 1 else int(job.warmup * steps)
    return min(wanted, steps - 1)


def _run_trainer(
    prepared: PreparedJob,
    model: PeftModel,
    corpus: Corpus,
    run: RunFolder,
    counters: Counters,
    as_rows: bool,
    bfloat16: bool,
    resume: bool,
    progress: Progress,
) -> None:
    job = prepared.job
    arguments = TrainingArguments(
        output_dir=str(run.path),
        per_device_train_batch_size=job.batch_size,
        gradient_accumulation_steps=job.gradient_accumulation,
        num_train_epochs=job.epochs,
        max_steps=job.max_steps or -1,
        learning_rate=job.learning_rate,
        lr_scheduler_type=job.scheduler,
        warmup_steps=_warmup_steps(job, len(corpus.rows)),
        weight_decay=job.weight_decay,
        seed=job.seed,
        data_seed=job.seed,
        logging_strategy="steps",
        logging_steps=1,
        save_strategy="steps" if job.save_steps else "no",
        save_steps=job.save_steps or 500,
        save_total_limit=2,
        report_to=job.report_to or "none",
        run_name=prepared.name,
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        use_cpu=next(model.parameters()).device.type == "cpu",
        average_tokens_across_devices=False,  # the loss is normalised over all ranks by StackTrainer itself
        label_names=["labels"],
    )
    trainer = StackTrainer(
        model=model,
        args=arguments,
        train_dataset=corpus.rows,
        data_collator=lambda rows: data_module.collate([example for row in rows for example in row]),
        counters=counters,
        as_rows=as_rows,
        bfloat16=bfloat16,
        progress=progress,
    )
    saves = run.checkpoints if resume else []
    try:
        trainer.train(resume_from_checkpoint=str(saves[-1]) if saves else None)
    except torch.OutOfMemoryError as error:
        raise Failed("the device's memory is full", hint="use a smaller --batch-size or --max-length") from error
    finally:
        trainer.guard.release()
    if trainer.guard.interrupted:
        raise Interrupted(
            f"interrupted after step {trainer.state.global_step} of {trainer.state.max_steps}; it was saved",
            hint=f"the same command with --resume goes on: stackctl train {prepared.name} … --resume",
        )


def _register(
    prepared: PreparedJob,
    registry: Registry,
    model: PeftModel,
    tokenizer: Any,
    corpus: Corpus,
    outcome: Run,
    counters: Counters,
) -> AdapterVersion:
    """Write the checkpoint beside its place, read it back, and register it."""
    weights = registry.root / "weights"
    files.sweep_staging(weights)
    with files.staging_directory(weights) as staged:
        save_adapter(model, staged)
        tokenizer.save_pretrained(staged)
        curve = "".join(json.dumps(point) + "\n" for point in counters.curve)
        (staged / "training_log.jsonl").write_text(curve)
        _check_saved(prepared, staged)
        return registry.add_version(
            prepared.name,
            lambda number: _entry(prepared, registry, staged, number, corpus, outcome),
            staged,
            prepared.job.description or None,
        )


def _check_saved(prepared: PreparedJob, staged: Path) -> None:
    """What was written is a whole adapter that fits the base and holds numbers.

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


def _entry(
    prepared: PreparedJob, registry: Registry, staged: Path, number: int, corpus: Corpus, outcome: Run
) -> AdapterVersion:
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
        chat_template="chat_template.jinja" if (staged / "chat_template.jinja").is_file() else None,
        usage=f"stackctl generate {used_with}",
        created_by=f"stackctl {__version__}",
    )
    files.write_atomic(staged / INFO, json.dumps(msgspec.to_builtins(info), indent=2, ensure_ascii=False) + "\n")
    return AdapterVersion(
        version=number,
        digest=checkpoint.digest(),
        path=registry.relative_weights_path(prepared.name, number),
        base=base.name,
        fingerprint=base.fingerprint,
        trained_on=prepared.trained_on,
        created=now(),
        lora=describe_lora(checkpoint.config),
        parameters=checkpoint.parameters,
        dtype=checkpoint.dtype,
        bytes=checkpoint.bytes,
        data=DataSource(
            path=prepared.data, sha256=corpus.records.sha256, records=corpus.records.count, format=corpus.records.format
        ),
        settings=msgspec.to_builtins(prepared.job.settings()),
        run=outcome,
        versions={name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")}
        | {"stackctl": __version__},
    )
