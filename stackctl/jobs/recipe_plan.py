"""What of a recipe is out of date, and why.

Out of date means other bytes of data, other settings, another base or a newer version underneath; never a file's time.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from stackctl.core import errors
from stackctl.core.errors import StackctlError, raise_all
from stackctl.core.expressions import BASE, Reference
from stackctl.core.schema import AdapterVersion
from stackctl.core.train_job import Recipe
from stackctl.jobs.beginning import own_newest
from stackctl.jobs.former_training import comparable_settings, settings_of, stands_on
from stackctl.jobs.job import PreparedJob, prepare_job
from stackctl.jobs.job_checks import data_path
from stackctl.jobs.recipe import RecipeFile, build_order, expression_of, names_in, needs_of
from stackctl.registry.adapters import resolve_adapter
from stackctl.registry.base_entries import resolve_base
from stackctl.registry.checkpoint_files import has_files
from stackctl.registry.planning import read_plan
from stackctl.registry.resolve import ResolvedStack, resolve_expression
from stackctl.registry.store import Registry
from stackctl.storage.hashes import data_digest


@dataclass(frozen=True)
class Step:
    """One thing to do: an adapter to train or a stack to compose. ``why`` is None when it is up to date.

    ``begins`` is the version at whose factors its training begins.
    """

    kind: Literal["adapter", "stack"]
    name: str
    why: str | None
    begins: str | None = None

    @property
    def to_do(self) -> str:
        """Why it is made, and where that begins, for a person."""
        return (self.why or "up to date") + (f"; begins at {self.begins}" if self.begins else "")


def plan_recipe(found: RecipeFile, registry: Registry, *, force: bool = False) -> list[Step]:
    """What of a recipe is out of date, in the order of doing it. Nothing is loaded or changed.

    Raises:
        StackctlError: everything that would stop the building later, at once.
    """
    recipe = found.recipe
    problems: list[StackctlError] = []
    steps: list[Step] = []
    going: set[str] = set()
    attempt = functools.partial(errors.attempt, problems)
    if recipe.base:
        attempt(resolve_base, registry, recipe.base)
    for name in build_order(recipe) if not problems else ():
        kind: Literal["adapter", "stack"] = "adapter" if name in recipe.train else "stack"
        begins: str | None = None
        needs = (needed for needed in needs_of(recipe, name) if needed.name in going)
        if newer := next((needed for needed in needs if not _is_there(registry, needed)), None):
            attempt(_check_ahead, found, registry, name)
            why = f"{newer} is made anew"
            if kind == "adapter" and recipe.train[name].rebase:
                begins = own_newest(registry, name, recipe.train[name])
        elif kind == "stack":
            why = attempt(_why_compose, found, registry, name)
        elif prepared := attempt(prepare_recipe_job, found, registry, name):
            why = attempt(_why_train, found, registry, prepared)
            why = "--force" if force else why
            begins = prepared.beginning.label if prepared.beginning else None
        else:
            why = None
        if why:
            going.add(name)
        steps.append(Step(kind, name, why, begins if why else None))
    if recipe.push and recipe.push.stack:
        for needed in _made_elsewhere(recipe, recipe.push.stack):
            attempt(resolve_expression, registry, str(needed))
    raise_all(problems)
    return steps


def _made_elsewhere(recipe: Recipe, expression: str | None) -> list[Reference]:
    """What an expression names that is no part of the recipe."""
    return [needed for needed in names_in(expression) if needed.name not in {**recipe.train, **recipe.stacks}]


def _is_there(registry: Registry, reference: Reference) -> bool:
    """Whether a certain version is meant, and exists: what is made anew beside it changes nothing."""
    adapter = registry.find_adapter(reference.name) if reference.version is not None else None
    return adapter is not None and adapter.numbered(reference.version) is not None


def _check_ahead(found: RecipeFile, registry: Registry, name: str) -> None:
    """What can be known of a part before that is made which it stands on."""
    recipe, problems = found.recipe, list[StackctlError]()
    attempt, job = functools.partial(errors.attempt, problems), recipe.train.get(name)
    for expression in (expression_of(recipe, name), job.teacher if job else None):
        for needed in _made_elsewhere(recipe, expression):
            attempt(resolve_expression, registry, str(needed))
    if job:
        for needed in _made_elsewhere(recipe, job.from_):
            attempt(resolve_adapter, registry, needed)
        for data in [job.data, *([job.eval_data] if job.eval_data else [])]:
            attempt(data_path, data, found.folder, name)
    raise_all(problems)


def prepare_recipe_job(found: RecipeFile, registry: Registry, name: str) -> PreparedJob:
    return prepare_job(registry, name, found.job(name), folder=found.folder, fresh=True)


def rests_after_all(found: RecipeFile, registry: Registry, prepared: PreparedJob) -> bool:
    """Whether a job that rebases has nothing to do now that everything beneath it is made: that came out the same."""
    return found.recipe.train[prepared.name].rebase and _why_train(found, registry, prepared) is None


def _why_train(found: RecipeFile, registry: Registry, prepared: PreparedJob) -> str | None:
    name = prepared.name
    adapter = registry.find_adapter(name)
    if not adapter:
        return "not trained yet"
    newest, rebases = adapter.newest(), found.recipe.train[name].rebase
    known = comparable_settings(settings_of(name, newest), watched=newest.eval_data is not None)
    settings = comparable_settings(prepared.job.settings(), watched=prepared.job.eval_data is not None)
    changed = [key for key, value in settings.items() if key in known and known[key] != value]
    if changed:
        return f"other {', '.join(changed)}"
    path = Path(prepared.data)
    if not newest.data or (path.exists() and data_digest(path) != newest.data.sha256):
        return "other data"
    if _other_held_out(prepared, newest):
        return "other held-out data"
    if newest.fingerprint != prepared.base.fingerprint:
        return "another base"
    if newest.trained_on != prepared.trained_on and not (rebases and stands_on(registry, newest, prepared.stack)):
        was, now = ("+".join(terms) or "the base" for terms in (newest.trained_on, prepared.trained_on))
        return f"trained on {was}, now {now}"
    known_teacher = (newest.distilled.teacher, newest.distilled.system) if newest.distilled else None
    teacher = prepared.teacher
    if known_teacher != ((teacher.label, teacher.system_digest) if teacher else None):
        return "another teacher"
    begins = prepared.beginning.label if prepared.beginning else None
    if newest.from_ != begins and not (rebases and (newest.from_ or "").startswith(f"{name}@")):
        return f"begun at {newest.from_ or 'nothing'}, now at {begins or 'nothing'}"
    if not has_files(registry, newest):
        return "its weights are missing"
    return None


def _other_held_out(prepared: PreparedJob, newest: AdapterVersion) -> bool:
    """Whether held-out records that have a say in which weights come out are others now.

    Versions that did not record them yet were made when they had none.
    """
    known = newest.eval_data
    if not prepared.job.held_out_decides:
        return known is not None and prepared.eval_data is None
    if known is None:
        return newest.run is None or newest.run.eval_loss is None
    path = Path(prepared.eval_data or "")
    return path.exists() and data_digest(path) != known.sha256


def resolve_recipe_stack(found: RecipeFile, registry: Registry, name: str) -> ResolvedStack:
    """A stack of the recipe by the newest versions of what it names."""
    expression = found.recipe.stacks[name]
    return resolve_expression(registry, expression, base=found.recipe.base if expression == BASE else None, fresh=True)


def _why_compose(found: RecipeFile, registry: Registry, name: str) -> str | None:
    resolved = resolve_recipe_stack(found, registry, name)
    read_plan(registry, resolved).check()
    stack = registry.find_stack(name)
    if not stack:
        return "not composed yet"
    same = [member.entry() for member in resolved.members] == stack.members
    if stack.method != resolved.method:
        return f"composed by {stack.method}"
    return None if same and stack.fingerprint == resolved.base.fingerprint else "other members"
