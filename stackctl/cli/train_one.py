"""One adapter: what training it would take, training it here or in several processes, and what came of it."""

from __future__ import annotations

import math
import shlex
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import msgspec

from stackctl.cli.command import Context
from stackctl.core.command_line import typed
from stackctl.core.schema import AdapterVersion
from stackctl.jobs import ranks
from stackctl.jobs.job import PreparedJob, optimizer_steps
from stackctl.jobs.launch import launch_training
from stackctl.jobs.launch_plan import Launch, plan_launch
from stackctl.jobs.micro_batches import CUT, StepCut, read_cut
from stackctl.lora.target_modules import natural_order
from stackctl.plan.validate import recorded_problems
from stackctl.registry.run_folders import run_folder
from stackctl.registry.versions import version_facts
from stackctl.render.output import Result
from stackctl.render.terminal import counted

if TYPE_CHECKING:
    from stackctl.engine.training.memory import StepPlan

_LARGEST_LOSS = 20.0
"""Above it (nats) perplexity is a number that says nothing."""
_TOLD_OF_A_RUN = (
    "steps", "tokens", "supervised_tokens", "loss", "processes", "batch_size", "gradient_accumulation",
    "gradient_checkpointing", "frozen", "frozen_error", "eval_loss_before",
    "eval_loss", "eval_accuracy", "eval_margin", "kept_step", "stopped_early", "accuracy", "margin",
)  # fmt: skip
"""What ``--json`` says of a run, by the names of its entry."""


def _import_libraries() -> None:
    """What training stands on, without what a single process never uses of it."""
    from stackctl.engine.libraries import quiet_libraries
    from stackctl.engine.quick_imports import import_peft, import_transformers

    if ranks.is_launched():
        quiet_libraries()
    else:
        import_transformers()
        import_peft()


def _check_data(context: Context, prepared: PreparedJob) -> tuple[Any, Any, Any]:
    """A job's corpus, the tokenizer that it was read with, and what it would adapt; the base itself is not loaded."""
    from stackctl.cli.progress import share_progress

    _import_libraries()
    from stackctl.engine.base.tokenizer import load_tokenizer
    from stackctl.engine.data.chat_template import choose_chat_template
    from stackctl.engine.devices import check_kernels
    from stackctl.engine.training.dataset import read_corpus
    from stackctl.engine.training.targets import targets_of

    check_kernels(prepared.job.optimizer)
    folder = context.base_folder(prepared.base)
    tokenizer = load_tokenizer(folder)
    choose_chat_template(tokenizer, prepared.base.name, prepared.plan)
    say = context.output.status
    targets = targets_of(prepared, folder, tokenizer, say)
    with share_progress(context.output) as reading:
        return read_corpus(prepared, tokenizer, say, reading, targets.tokens), tokenizer, targets


def dry_run_result(context: Context, prepared: PreparedJob) -> Result:
    """Check a job down to its tokens, and say what would be trained; nothing is written."""
    launch = plan_launch(prepared)
    corpus, tokenizer, targets = _check_data(context, prepared)
    from stackctl.engine.training.dataset import preview_parts

    job = prepared.job
    processes = launch.processes if launch else ranks.world_size()
    plan = _plan_step(prepared, corpus, targets, launch)
    batch = plan.cut.records * plan.cut.count * processes
    steps = optimizer_steps(job, len(corpus.rows), processes)
    data = {
        "adapter": prepared.name,
        "base": prepared.base.name,
        "on": prepared.trained_on,
        "from": prepared.beginning.label if prepared.beginning else None,
        "teacher": prepared.teacher.label if prepared.teacher else None,
        "records": corpus.records.count,
        "tokens": corpus.encoded.tokens,
        "supervised_tokens": corpus.encoded.supervised_tokens,
        "supervised_share": corpus.encoded.supervised_tokens / corpus.encoded.tokens,
        "truncated": corpus.encoded.truncated,
        "unsupervised": corpus.encoded.unsupervised,
        "preview": [
            {"text": text, "supervised": learned}
            for parts in preview_parts(corpus.rows[0][: 2 if job.prefers else 1], tokenizer)
            for text, learned in parts
        ],
        "steps": steps,
        "adapts": sorted(targets.modules, key=natural_order),
        "leaves_out": targets.left_out,
        "trained_tokens": [token for _, token in sorted(targets.tokens.items())],
        "batch_size": plan.cut.records,
        "gradient_accumulation": plan.cut.count,
        "gradient_checkpointing": plan.estimate.checkpointing,
        "memory": plan.estimate.as_json(),
        "settings": msgspec.to_builtins(job.settings()),
        "dry_run": True,
    }
    on = f" on {prepared.plan.expression}, frozen and active" if prepared.trained_on else ""
    on = f" taught by {prepared.teacher.label}" if prepared.teacher else on
    text = (
        f"would train {prepared.name}{on}, base {prepared.base.name}: {steps} steps of {batch} records, "
        f"rank {job.effective_rank()}, {corpus.encoded.supervised_tokens:,} supervised tokens an epoch"
        + "\n".join(["", str(targets), *plan.told()])
    )
    return Result(data, prepared.name, text)


def _check_before_launch(context: Context, prepared: PreparedJob, launch: Launch, *, resume: bool) -> Launch:
    """What is wrong with the data is found here and told once, and what memory it will take, and how steps are cut."""
    corpus, _, targets = _check_data(context, prepared)
    context.output.status(str(targets))
    run = run_folder(context.registry, prepared.name)
    kept = read_cut(run.signature.get(CUT)) if resume and run.checkpoints else None
    plan = _plan_step(prepared, corpus, targets, launch, kept)
    for text in plan.told():
        context.output.status(text)
    return replace(launch, cuts=(plan.cut, *plan.smaller), resume=resume, again=typed_again())


def _plan_step(
    prepared: PreparedJob, corpus: Any, targets: Any, launch: Launch | None, kept: StepCut | None = None
) -> StepPlan:
    from stackctl.engine.training.memory import ProcessGroup, plan_step

    group = ProcessGroup(ranks.world_size())
    if launch:
        group = ProcessGroup(launch.processes, launch.sharded, launch.checkpointing, is_here=False)
    return plan_step(prepared, corpus, targets, group, kept)


def typed_again() -> str:
    """What was typed, with ``--resume``: the command that goes on, ready to paste."""
    if linked := ranks.link():
        return linked.again
    words = list(typed().words)
    if sys.argv[1:2] in (["train"], ["distil"]) and "--resume" not in words:
        words.insert(len(words) - len(sys.argv[2:]), "--resume")
    return shlex.join(words)


def trained_result(context: Context, prepared: PreparedJob, *, resume: bool) -> Result:
    """Train a prepared job, here or in several processes, and say what came of it."""
    from stackctl.cli.progress import share_progress, training_progress

    ranks.check_number()
    for note in prepared.stack.notes:
        context.output.note(note)
    launch = plan_launch(prepared)
    if launch:
        launch = _check_before_launch(context, prepared, launch, resume=resume)
    with (
        share_progress(context.output) as reading,
        share_progress(context.output, "log-probabilities under the frozen stack") as comparing,
        training_progress(context.output, prepared.name) as progress,
    ):
        if launch:
            return launch_training(launch, prepared, context.registry.root, context.output, progress)
        _import_libraries()
        from stackctl.engine.training.run import train_adapter
        from stackctl.engine.training.state import RunOutput

        output = RunOutput(context.output.status, progress, reading, typed_again(), comparing)
        done = train_adapter(prepared, context.registry, output, resume=resume)
    if done is None:
        return Result({}, "")
    version, run = done.version, done.version.run
    assert run is not None, "training always records its run"
    label = f"{prepared.name}@{version.version}"
    speed = run.tokens / run.seconds if run.seconds else 0.0
    data = {
        **version_facts(context.registry, prepared.name, version, prepared.base.name),
        "from": version.from_,
        "moved": msgspec.structs.asdict(version.moved) if version.moved else None,
        "distilled": msgspec.structs.asdict(version.distilled) if version.distilled else None,
        **{name: getattr(run, name) for name in _TOLD_OF_A_RUN},
        "tokens_per_second": speed,
        "trainable_parameters": done.trainable_parameters,
        "trained_tokens": version.trained_tokens,
        "objective": prepared.job.objective,
        "beta": prepared.job.effective_beta,
        "problems": [problem.json() for problem in recorded_problems(label, version.problems)],
    }
    steps = counted(run.steps, "step")
    text = f"trained {label} in {steps}, {speed:,.0f} tokens/s\n" + _improvement(version, done.counters.curve)
    for problem in version.problems:
        context.output.status(f"warning: {problem.message}\nhint: {problem.hint}")
    return Result(data, label, text)


def with_next(result: Result, prepared: PreparedJob) -> Result:
    """The result, and what one does with a new adapter: try it, or put it together with what it stands on.

    After a run that went wrong the hint has said what is next.
    """
    if ranks.is_worker() or result.json["problems"]:  # the command that launched a worker says so
        return result
    below = [member.adapter.name for member in prepared.stack.members]
    if prepared.teacher and prepared.teacher.plan.modules and not prepared.teacher.system:
        then = f'compare {prepared.teacher.label} {prepared.name} -p "…"'
        return replace(result, screen=f"{result.screen}\nnext: stackctl {then}")
    then = f"compose {'+'.join([*below, prepared.name])}" if below else f"generate {prepared.name}"
    return replace(result, screen=f"{result.screen}\nnext: stackctl {then}")


def _improvement(version: AdapterVersion, curve: list[dict[str, float]]) -> str:
    """What the run was good for, in a line or two."""
    run, moved, distilled = version.run, version.moved, version.distilled
    assert run is not None, "training always records its run"
    first, last = curve[0]["loss"], curve[-1]["loss"]
    text = f"loss of a step {_change(first, last)}"
    if run.accuracy is not None and run.margin is not None:
        text += f"\nranked rightly while learning {run.accuracy:.0%}, mean margin {run.margin:.3f}"
    before, after = run.eval_loss_before, run.eval_loss
    if before is None or after is None:
        return text
    if distilled:
        error = f" ± {1.96 * distilled.divergence_error:.2g}" if distilled.divergence_error is not None else ""
        text += f"\nheld-out divergence from {distilled.teacher} {_change(before, after)}{error} nats a token"
    else:
        text += f"\nheld-out loss {_change(before, after)}"
    if run.eval_accuracy is not None and run.eval_margin is not None:
        text += f", ranked rightly {run.eval_accuracy:.0%}, mean margin {run.eval_margin:.3f}"
    elif max(before, after) < _LARGEST_LOSS and not distilled:
        text += f", perplexity {math.exp(before):.4g} -> {math.exp(after):.4g}"
    if moved and moved.mark is not None:
        reached = "not reached" if moved.reached_step is None else f"reached at step {moved.reached_step}"
        text += f"; what it had where it stood, {moved.mark:.3f}, was {reached}"
    if run.kept_step != run.steps or run.stopped_early:
        stopped = f", stopped early after {run.steps}" if run.stopped_early else f" of {run.steps}"
        text += f"; kept: the weights of step {run.kept_step}{stopped}"
    if after >= before:
        text += "\nnote: no gain on the held-out records; try a lower --learning-rate, or other data"
    return text


def _change(before: float, after: float) -> str:
    per_cent = f" ({(after - before) / before:+.0%})" if before > 0 else ""
    return f"{before:.3f} -> {after:.3f}{per_cent}"
