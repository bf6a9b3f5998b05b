"""stackctl push, stackctl push-to-hub"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from stackctl.cli.command import SHARE, Context, command
from stackctl.cli.shared_options import argument, expression, typed_text
from stackctl.core import Say
from stackctl.core.command_line import CommandLine, typed
from stackctl.core.errors import StackctlError, Usage, attempt, raise_all
from stackctl.core.hub_ids import is_dataset_id, is_ref_name
from stackctl.core.train_job import PushTarget
from stackctl.plan.stack_plan import StackPlan
from stackctl.registry.resolve import current_stack, resolve_expression
from stackctl.registry.store import Registry
from stackctl.render.output import Result

_of_repo = functools.partial(typer.Option, rich_help_panel="The repo")
_of_card = functools.partial(typer.Option, rich_help_panel="The model card")
_EXAMPLES = """\
stackctl push storyteller me/storyteller --dry-run
stackctl push storyteller me/storyteller --private
stackctl push storyteller me/storyteller --members --tag v2"""


@dataclass(frozen=True)
class _RepoOptions:
    """How the commit comes into the repo; each field is an option."""

    private: Annotated[bool, _of_repo(help="Make a new repo private.")] = False
    revision: Annotated[str | None, _of_repo(help="The branch to push to.", metavar="BRANCH")] = None
    create_pr: Annotated[bool, _of_repo(help="Open a pull request instead.")] = False
    message: Annotated[str | None, _of_repo("--message", "-m", parser=typed_text, help="Commit message.")] = None
    tag: Annotated[str | None, _of_repo(help="Tag for the commit.")] = None


@dataclass(frozen=True)
class _CardOptions:
    """What the model card says beyond the entries; each field is an option."""

    base_id: Annotated[
        str | None, typer.Option("--base-id", help="The base's id on the Hub, when it is not known.", metavar="ID")
    ] = None
    license_: Annotated[str | None, _of_card("--license", help="License, such as apache-2.0.", metavar="NAME")] = None
    language: Annotated[
        list[str] | None, _of_card(help="Language code, such as en; may be repeated.", metavar="CODE")
    ] = None
    dataset: Annotated[list[str] | None, _of_card(help="A data set on the Hub; may be repeated.", metavar="ID")] = None

    @property
    def datasets(self) -> tuple[str, ...]:
        return tuple(self.dataset or ())


def _push(
    context: Context,
    what: Annotated[
        str | None, expression(help="An adapter, a stack or an expression; the current stack when left out.")
    ] = None,
    repo: Annotated[str | None, argument(help="The repo on the Hub, owner/name; else the recipe's push:.")] = None,
    *,
    into: _RepoOptions,
    members: Annotated[
        bool, typer.Option(help="Also push each member in its own folder, so that pull restores them separately.")
    ] = False,
    card: _CardOptions,
    dry_run: Annotated[bool, typer.Option(help="Show what would be pushed; send nothing.")] = False,
) -> Result:
    """Push an adapter or a stack to the Hub, in one commit: weights, tokenizer, recipe and card."""
    from stackctl.hub.card import CardFacts
    from stackctl.hub.push import PushOptions
    from stackctl.hub.push import push as push_stack
    from stackctl.hub.repos import parse_repo

    registry, output = context.registry, context.output
    problems = [*_unfit_words(card.datasets, {"--revision": into.revision, "--tag": into.tag})]
    target = attempt(problems, _target, registry, what, repo)
    stack: Any = attempt(problems, resolve_expression, registry, target.stack) if target else None
    repo_id: Any = attempt(problems, parse_repo, target.repo) if target else None
    raise_all(problems)
    options = PushOptions(
        again=typed(),
        export=functools.partial(_export, registry, output.status),
        base_id=target.base_id if card.base_id is None else card.base_id,
        facts=CardFacts(card.license_, tuple(card.language or ()), card.datasets),
        members=members,
        private=into.private or target.private,
        revision=into.revision,
        create_pr=into.create_pr,
        message=into.message,
        tag=into.tag,
        dry_run=dry_run,
        progress=output.shows_progress,
    )
    return _result(push_stack(registry, stack, repo_id, options, output.status), stack.notes)


push = command("push", example=_EXAMPLES, panel=SHARE)(_push)
push_to_hub = command(
    "push-to-hub", example="stackctl push-to-hub storyteller me/storyteller", panel=SHARE, hidden=True
)(_push)


def _unfit_words(datasets: Sequence[str], refs: dict[str, str | None]) -> Iterator[StackctlError]:
    """What the Hub, or git, has no place for: ids of data sets, and names of a branch or a tag by their options."""
    if wrong := [one for one in datasets if not is_dataset_id(one)]:
        said = f"--dataset {', '.join(map(repr, wrong))}: not the id of a data set on the Hub"
        yield Usage(said, hint="write owner/name, as on the data set's page")
    for option, name in refs.items():
        if name is not None and not is_ref_name(name):
            yield Usage(f"{option} '{name}': git has no branch or tag of such a name", hint="write one such as v1.0")


def prepare_push(registry: Registry, what: str, repo: str) -> dict[str, Any]:
    """What a push would send, as JSON shows it; asks nobody."""
    from stackctl.hub.push import PushOptions, prepare

    export = functools.partial(_export, registry, lambda _: None)
    options = PushOptions(CommandLine(("stackctl", "push", what, repo)), export)
    files = prepare(registry, resolve_expression(registry, what), repo, options)
    return {"repo": repo, "files": [dataclasses.asdict(file) for file in files]}


def _export(registry: Registry, say: Say, plan: StackPlan, out: Path) -> None:
    from stackctl.engine.export.peft import export_peft

    def base() -> Path:
        from stackctl.engine.base.folder import base_folder

        return base_folder(plan.known_base, registry, say)

    export_peft(plan, out, base=base)


def _target(registry: Registry, what: str | None, repo: str | None) -> PushTarget:
    """What goes where: the arguments (one alone is the repo), else the recipe's ``push:``."""
    if what is not None and repo is not None:
        return PushTarget(stack=what, repo=repo)
    recipe = _recipe_target()
    if what is not None and "/" in what:
        return PushTarget(stack=current_stack(registry), repo=what)
    if recipe is None:
        named = what or "storyteller"
        hint = f"stackctl push {named} owner/name, or put push: {{stack: {named}, repo: owner/name}} into stackctl.yaml"
        raise Usage(f"no repo was named{f' to push {what} to' if what else ''}", hint=hint)
    chosen = what or recipe.stack or current_stack(registry)
    return PushTarget(stack=chosen, repo=recipe.repo, base_id=recipe.base_id, private=recipe.private)


def _recipe_target() -> PushTarget | None:
    from stackctl.jobs.recipe import find_recipe, read_recipe

    path = find_recipe()
    return read_recipe(path).recipe.push if path else None


def _result(pushed: Any, notes: tuple[str, ...]) -> Result:
    if pushed.outcome == "planned":
        text = f"would push {pushed.what} to {pushed.url}; nothing was sent"
    elif pushed.outcome == "unchanged":
        text = f"{pushed.what} is there already, nothing changed: {pushed.url}"
    else:
        text = f"pushed {pushed.what}: {pushed.url}"
    return Result(dataclasses.asdict(pushed), pushed.url, text, notes=notes)
