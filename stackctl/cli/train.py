"""stackctl train"""

from __future__ import annotations

import functools
import shlex
import types
import typing
from collections.abc import Collection
from dataclasses import dataclass, make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from stackctl.cli.command import TRAIN, Context, command
from stackctl.cli.shared_options import DEVICE_PANEL, argument, complete_bases, complete_what, typed_text
from stackctl.cli.train_one import dry_run_result, trained_result, with_next
from stackctl.core.errors import StackctlError, Usage
from stackctl.core.library_messages import explain_option
from stackctl.core.train_job import TrainJob
from stackctl.jobs.config_file import JobFile, is_recipe, read_job
from stackctl.jobs.job import PreparedJob, prepare_job
from stackctl.jobs.micro_batches import AUTO
from stackctl.jobs.recipe import RECIPE_FILE, RecipeFile, find_recipe, read_recipe
from stackctl.jobs.recipe_plan import Step, plan_recipe, prepare_recipe_job, resolve_recipe_stack, rests_after_all
from stackctl.registry.planning import read_plan
from stackctl.registry.stacks import save_stack
from stackctl.registry.store import Registry
from stackctl.render.output import Result

_EXAMPLES = """\
stackctl train
stackctl train style --base smollm2 --data style.jsonl --rank 16 --epochs 3
stackctl train instruct --on style --data chat.jsonl --eval-data heldout.jsonl"""
_COMPLETIONS = {"on": complete_what, "from": complete_what, "teacher": complete_what, "base": complete_bases}
_TRAINING, _RUN = "Training", "The run"
_GROUPS: dict[str, tuple[str, ...]] = {
    "What is trained": ("on", "from", "rebase", "base", "data", "description", "teacher", "system"),
    "The adapter": ("rank", "alpha", "dropout", "target_modules", "use_rslora", "orthogonal", "train_tokens"),
    _TRAINING: (),
    "Held-out records": ("eval_data", "eval_steps", "keep", "patience"),
    DEVICE_PANEL: ("dtype", "frozen", "gradient_checkpointing", "cache", "num_processes", "accelerate_config"),
    _RUN: ("save_steps", "report_to"),
}
"""The options of the help by their group, in this order; those that stand in none say how it is trained."""
_DISTIL = "With --objective distil: "
"""How the description of what only that objective has begins; a command that has no other leaves it out."""
_GROUP_OF = {name: group for group, names in _GROUPS.items() for name in names}
_KINDS = {
    "on": "EXPR", "from": "REF", "teacher": "EXPR", "system": "FILE",
    "base": "NAME", "data": "FILE", "eval_data": "FILE", "accelerate_config": "FILE",
    "target_modules": "NAMES", "report_to": "NAMES", "train_tokens": "TOKENS",
    "batch_size": "NUMBER",
}  # fmt: skip
_TEXTS = ("description", "target_modules", "train_tokens")
"""Options that are read as text; what others name may be a file."""

_run_option = functools.partial(typer.Option, rich_help_panel=_RUN)
RESUME = Annotated[bool, _run_option(help="Go on with the unfinished run of that name.")]
DRY_RUN = Annotated[bool, _run_option(help="Check everything and show the plan.")]


@dataclass(frozen=True)
class Switches:
    """How a training goes; each field is an option of train."""

    resume: RESUME = False
    dry_run: DRY_RUN = False
    force: Annotated[bool, _run_option(help="Without NAME: train what is up to date, too.")] = False


def job_options(without: Collection[str] = ()) -> Any:
    """A group of options, one for each field of :class:`TrainJob`, in the order of the help; None if not typed."""
    fields = sorted(msgspec.structs.fields(TrainJob), key=lambda field: _place(field.encode_name))
    options = [(field.name, _option(field, without), None) for field in fields if field.encode_name not in without]
    return make_dataclass("JobOptions", options, frozen=True)


def typed_options(options: Any) -> dict[str, Any]:
    """Those of :func:`job_options` that were typed, by the names of the fields."""
    return {key.rstrip("_"): value for key, value in vars(options).items() if value is not None}


@command("train", example=_EXAMPLES, panel=TRAIN)
def train(
    context: Context,
    name: Annotated[str | None, argument(help="What the new adapter is called.")] = None,
    *,
    job: JobOptions,
    config: Annotated[
        Path | None,
        _run_option(help="Settings as YAML or JSON; a flag beats the file.", metavar="FILE", show_default=False),
    ] = None,
    switches: Switches,
) -> Result:
    """Train one new adapter on a frozen, active stack; without NAME, build what stackctl.yaml says.

    Only the new adapter learns and only it is saved. That the stack under it was active and did not change is
    proved on every run, or nothing is registered.
    """
    given = typed_options(job)
    if name is None and (config is None or is_recipe(config)):
        return _build(context, config, given, switches)
    found = read_job(config, context.registry) if config else None
    name = name or (found.name if found else None)
    if name is None:
        raise Usage(
            f"{config} does not name the adapter", hint=f"stackctl train NAME --config {shlex.quote(str(config))}"
        )
    if found and found.ignored:
        context.output.note(f"{config}: {', '.join(found.ignored)} has no meaning here and is ignored")
    prepared = prepare(context, name, found, given)
    if switches.dry_run:
        return dry_run_result(context, prepared)
    return with_next(trained_result(context, prepared, resume=switches.resume), prepared)


def _place(option: str) -> tuple[int, int]:
    """Where an option stands in the help: its group, and its place in there (that of its field, in a group of none)."""
    group = _GROUP_OF.get(option, _TRAINING)
    named = _GROUPS[group]
    return list(_GROUPS).index(group), named.index(option) if option in named else 0


def _option(field: msgspec.structs.FieldInfo, without: Collection[str]) -> Any:
    """An option for a field: its type, its description and, in the help, its default."""
    type_, about = _plain_type(field.type)
    if "objective" in without and about.startswith(_DISTIL):
        about = about[len(_DISTIL) :].capitalize()
    name = field.encode_name
    default = field.default if field.default not in (None, "", msgspec.NODEFAULT) else None
    flag = "--" + name.replace("_", "-")
    names = [f"{flag}/--no-{flag[2:]}"] if type_ is bool else [flag]
    option = typer.Option(
        *names,
        help=about,
        show_default=False if default is None else f"{default:g}" if isinstance(default, float) else str(default),
        autocompletion=_COMPLETIONS.get(name),
        rich_help_panel=_GROUP_OF.get(name, _TRAINING),
        parser=typed_text if name in _TEXTS else None,
        metavar=_KINDS.get(name),
    )
    return Annotated[type_ | None, option]


def _plain_type(annotation: Any) -> tuple[Any, str]:
    """The type that a command line can read, and the description, of a msgspec annotation."""
    about = ""
    while True:
        if typing.get_origin(annotation) is Annotated:
            annotation, *meta = typing.get_args(annotation)
            about = next((m.description for m in meta if isinstance(m, msgspec.Meta) and m.description), about)
        elif typing.get_origin(annotation) in (typing.Union, types.UnionType):
            choices = [a for a in typing.get_args(annotation) if a is not type(None)]
            plain = [a for a in choices if typing.get_origin(a) is not list]
            annotation = plain[0] if len(plain) == 1 or str in plain else str  # a number or a word is read as text
        else:
            return annotation, about


if TYPE_CHECKING:
    JobOptions = Any
else:
    JobOptions = job_options()


def prepare(context: Context, name: str, config: JobFile | None, flags: dict[str, Any]) -> PreparedJob:
    """Put a job together and check it: a flag beats the file, the file beats the defaults.

    Without ``--config`` and ``--data``, the job of that name in the nearest ``stackctl.yaml`` is meant.
    """
    values = config.values if config else {}
    recipe = find_recipe() if config is None and "data" not in flags else None
    fresh = False
    if recipe and name in (found := read_recipe(recipe)).recipe.train:
        fresh = "on" not in flags
        values = {key: value for key, value in msgspec.to_builtins(found.job(name)).items() if value is not None}
        if "from" in flags:
            values.pop("rebase", None)
        for key in ("data", "eval_data", "system"):
            if key in values and (found.folder / values[key]).exists():
                values[key] = str(found.folder / values[key])
    auto_batch = flags.get("batch_size") == AUTO and isinstance(values.get("batch_size"), int)
    if auto_batch:  # the step stays that of the file
        flags = {key: value for key, value in flags.items() if key != "batch_size"}
    try:
        job = msgspec.convert({**values, **flags}, TrainJob, strict=False)
    except msgspec.ValidationError as error:
        raise Usage(explain_option(error, TrainJob), hint="stackctl train --help") from None
    return prepare_job(context.registry, name, job, fresh=fresh, auto_batch=auto_batch)


# -- a recipe ---------------------------------------------------------------------------------------------------------


def _build(context: Context, config: Path | None, flags: dict[str, Any], switches: Switches) -> Result:
    if flags:
        given = ", ".join("--" + key.replace("_", "-") for key in flags)
        raise Usage(
            f"{given} needs the NAME of an adapter",
            hint=f"stackctl train NAME {given} …, or write it into {RECIPE_FILE}",
        )
    path = config or find_recipe()
    if path is None:
        raise Usage(
            f"no NAME was given and there is no {RECIPE_FILE} here or above",
            hint="stackctl train style --data style.jsonl",
        )
    return build_recipe(context, read_recipe(path), switches)


def build_recipe(context: Context, found: RecipeFile, switches: Switches) -> Result:
    """Bring everything of a recipe up to date, in order; what is up to date is left alone."""
    registry = context.registry
    steps = plan_recipe(found, registry, force=switches.force)
    out_of_date = [step for step in steps if step.why]
    plan = [{"kind": s.kind, "name": s.name, "why": s.why, "from": s.begins} for s in steps]
    if not out_of_date:
        if context.output.json_mode:
            context.output.status("up to date")
        return Result({"plan": plan, "built": []}, "", "up to date")
    if switches.dry_run:
        return Result({"plan": plan, "built": [], "dry_run": True}, "", lambda: _plan_table(steps))
    built: list[dict[str, Any]] = []
    for step in out_of_date:
        context.output.status(f"{step.name}: {step.to_do}")
        try:
            if step.kind == "adapter":
                prepared = prepare_recipe_job(found, registry, step.name)
                if not switches.force and rests_after_all(found, registry, prepared):
                    context.output.status(f"{step.name}: up to date; what was made anew beneath it is the same")
                    continue
                trained = trained_result(context, prepared, resume=switches.resume)
                context.output.status(str(trained.screen))
                built.append(trained.json)
            else:
                built.append(_compose(found, registry, step.name))
        except StackctlError as error:
            if built:
                done = ", ".join(_labels(built))
                context.output.note(f"{done} is built and stays; the same command goes on with what is left")
            raise type(error)(f"{step.name}: {error.message}", hint=error.hint) from error
    names = _labels(built)
    return Result({"plan": plan, "built": built}, "\n".join(names), f"built {', '.join(names)}")


def _labels(built: list[dict[str, Any]]) -> list[str]:
    return [f"{b['adapter']}@{b['version']}" if "adapter" in b else b["stack"] for b in built]


def _compose(found: RecipeFile, registry: Registry, name: str) -> dict[str, Any]:
    resolved = resolve_recipe_stack(found, registry, name)
    read_plan(registry, resolved).check()
    save_stack(registry, name, resolved)
    return {"stack": name, "members": [str(member) for member in resolved.members]}


def _plan_table(steps: list[Step]) -> Any:
    from stackctl.render.tables import table

    return table(["what", "name", "to do"], [[s.kind, s.name, s.to_do] for s in steps])
