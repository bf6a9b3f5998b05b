"""What can be wrong with a training job, checked by its settings, its stack and its base alone: nothing is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from stackctl.core.errors import Incompatible, Usage, did_you_mean
from stackctl.core.hub_ids import parse_dataset_id
from stackctl.core.schema import Base
from stackctl.core.train_job import TrainJob
from stackctl.lora.target_modules import expand_modules, named_targets, parse_targets
from stackctl.lora.target_parameters import EXPERTS, PLAIN
from stackctl.machine.optional_packages import check_installed
from stackctl.plan.methods import SUM
from stackctl.plan.stack_plan import StackPlan
from stackctl.registry.resolve import ResolvedStack, one_adapter
from stackctl.storage.hashes import texts_in
from stackctl.storage.paths import missing_path, typed_path


def data_path(data: str | None, folder: Path | None, name: str) -> str:
    """A file of data as a path, or the name of a Hub data set as it stands."""
    if not data:
        raise Usage(f"no data to train '{name}' on", hint=f"stackctl train {name} --data FILE.jsonl")
    path = typed_path(data, folder, "--data")
    if path.exists():
        is_folder = path.is_dir()
        if not (texts_in(path) if is_folder else path.is_file()):
            kind = "a folder without texts" if is_folder else "not a regular file"
            raise Usage(
                f"the data {data} is {kind}",
                hint="give a .jsonl, .json, .parquet, .csv or .txt file, or a folder of texts",
            )
        return str(path)
    if parse_dataset_id(data) is None:
        raise missing_path(path, "the data file")
    return data


def check_is_sum(stack: ResolvedStack) -> None:
    if stack.method != SUM:
        raise Incompatible(
            f"the stack '{stack.name}' is composed by {stack.method}, and only a sum can be trained on",
            hint=one_adapter(str(stack.name)),
        )


def check_not_on_itself(name: str, stack: ResolvedStack) -> None:
    if any(member.adapter.name == name for member in stack.members):
        raise Usage(
            f"'{name}' cannot be trained on itself",
            hint=f"choose another name for what comes next, for example {name}-2",
        )


def check_orthogonal(job: TrainJob, plan: StackPlan) -> None:
    if not plan.members:
        raise Usage("--orthogonal needs a frozen stack to be orthogonal to", hint="name it: --on STACK")
    for name, module in plan.modules.items():
        reads = module.shape[0] if module.type == "Embedding" else module.shape[1]
        if module.rank + job.effective_rank() > reads:
            raise Incompatible(
                f"--orthogonal: {name} reads {reads} directions, the frozen stack {module.rank} of them, "
                f"and rank {job.effective_rank()} finds no room beside it",
                hint="use a smaller --rank, or leave out --orthogonal",
            )


WITHOUT_SFT = {
    "sft": "--objective sft is that loss alone",
    "distil": "distil learns from a teacher, and from no answers",
    "kto": "kto has no chosen answers, each answer has a label",
    "orpo": "the chosen answer's own loss is a part of orpo",
}
"""Why an objective has no use for the chosen answer's own loss besides."""


def contradictions(job: TrainJob) -> Iterator[Usage]:
    """Settings of a job that say nothing beside its others."""
    given = [f"--{name.replace('_', '-')}" for name in ("eval_steps", "patience") if getattr(job, name) is not None]
    if given and not job.eval_data:
        what = f"{' and '.join(given)} {'needs' if len(given) == 1 else 'need'} held-out records to evaluate on"
        yield Usage(what, hint="name them: --eval-data FILE.jsonl")
    if job.objective != "distil" and (job.teacher or job.system):
        yield Usage("--teacher and --system are for --objective distil", hint="add --objective distil")
    if not job.prefers and job.beta is not None:
        yield Usage("--beta is for objectives of pairs", hint="name one: --objective dpo")
    if job.objective != "dpo" and job.label_smoothing:
        yield Usage("--label-smoothing is dpo's", hint="use --objective dpo, or leave it out")
    if job.sft_weight and (why := WITHOUT_SFT.get(job.objective)):
        yield Usage(f"--sft-weight: {why}", hint="leave it out, or use --objective dpo, ipo or simpo")
    if job.prefers and job.pack:
        yield Usage("--pack joins text records, and pairs are none", hint="leave out --pack")


def check_precision(job: TrainJob) -> None:
    if job.dtype == "nf4" and job.frozen == "fold":
        hint = "leave out --frozen fold: the stack is kept live"
        raise Incompatible("a delta cannot be folded into weights of four bits", hint=hint)
    if job.dtype == "nf4":
        check_installed("bitsandbytes")


def check_optimizer(job: TrainJob) -> None:
    if job.eight_bits:
        check_installed("bitsandbytes", f"--optimizer {job.optimizer}")


def check_targets(job: TrainJob, base: Base) -> None:
    modules = expand_modules(base.modules)
    targets = parse_targets(job.target_modules)
    kinds = (*PLAIN, *EXPERTS)
    last_names = sorted({name.rpartition(".")[2] for name, shape in modules.items() if shape.type in kinds})
    hint = f"modules of {base.name}: {', '.join(last_names)}"
    if isinstance(targets, str):
        if not named_targets(targets, base):
            raise Usage(f"target_modules: '{targets}' matches no module of the base '{base.name}'", hint=hint)
        return
    missing = [target for target in targets if not named_targets([target], base)]
    if missing or not targets:
        near = did_you_mean(missing[0], last_names, hint) if missing else hint
        raise Usage(f"target_modules: the base '{base.name}' has no {', '.join(missing) or 'such modules'}", hint=near)
