"""``stackctl.yaml``: what to train, on what, in which order, and what of it is out of date.

Out of date means other bytes of data, other settings, another base or a newer version underneath; never a file's time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from stackctl import files
from stackctl.errors import NotFound, StackctlError, Usage, raise_all
from stackctl.jobs import PreparedJob, prepare_job
from stackctl.names import parse_expression, parse_name, parse_stack_name
from stackctl.registry import Registry
from stackctl.schema import Recipe, TrainJob
from stackctl.yamlfile import convert, parse_yaml, read_text

FILE = "stackctl.yaml"


@dataclass(frozen=True)
class RecipeFile:
    """A recipe and where it stands (its data paths are relative to that folder)."""

    recipe: Recipe
    path: Path

    @property
    def folder(self) -> Path:
        return self.path.parent

    def job(self, name: str) -> TrainJob:
        """A job of the recipe, on the recipe's base when it names none itself."""
        job = self.recipe.train[name]
        return job if job.base or job.on else msgspec.structs.replace(job, base=self.recipe.base)


def find_recipe() -> Path | None:
    """The nearest ``stackctl.yaml`` from the working directory upward."""
    here = Path.cwd()
    return next((p / FILE for p in (here, *here.parents) if (p / FILE).is_file()), None)


def read_recipe(path: Path) -> RecipeFile:
    """Read and check a recipe by itself: its names, and that nothing stands on itself.

    Raises:
        NotFound, Usage: it is not there, or anything in it is wrong, all at once.
    """
    recipe = convert(parse_yaml(read_text(path), str(path)), Recipe, str(path))
    problems: list[StackctlError] = []
    checks: list[tuple[Callable[[str], Any], str]] = [
        *((parse_name, name) for name in recipe.train),
        *((parse_expression, job.on) for job in recipe.train.values() if job.on),
        *((parse_stack_name, name) for name in recipe.stacks),
        *((parse_expression, expression) for expression in recipe.stacks.values()),
    ]
    for check, text in checks:
        try:
            check(text)
        except StackctlError as error:
            problems.append(Usage(f"{path}: {error.message}", hint=error.hint))
    problems += [
        Usage(f"{path}: '{name}' is both an adapter and a stack", hint="give the stack another name")
        for name in set(recipe.train) & set(recipe.stacks)
    ]
    raise_all(problems)
    found = RecipeFile(recipe, path.absolute())
    training_order(recipe)
    return found


def training_order(recipe: Recipe) -> list[str]:
    """The names of the adapters, each after all that it stands on.

    Raises:
        Usage: some stand on one another in a circle.
    """
    order: list[str] = []
    visiting: list[str] = []

    def visit(name: str) -> None:
        if name in order:
            return
        if name in visiting:
            circle = " -> ".join([*visiting[visiting.index(name) :], name])
            raise Usage(f"adapters of the recipe stand on one another in a circle: {circle}", hint="mend an 'on:'")
        visiting.append(name)
        for needed in _needs(recipe, recipe.train[name].on):
            visit(needed)
        visiting.pop()
        order.append(name)

    for name in recipe.train:
        visit(name)
    return order


def _needs(recipe: Recipe, expression: str | None) -> Iterator[str]:
    """The adapters of the recipe that an expression names, through the recipe's stacks too."""
    for term in parse_expression(expression) if expression else ():
        name = term.reference.name
        if name in recipe.train:
            yield name
        elif name in recipe.stacks:
            yield from _needs(recipe, recipe.stacks[name])


@dataclass(frozen=True)
class Step:
    """One thing to do: an adapter to train or a stack to compose. ``why`` is None when it is up to date."""

    kind: str
    name: str
    why: str | None


def plan_recipe(found: RecipeFile, registry: Registry, *, force: bool = False) -> list[Step]:
    """What of a recipe is out of date, in the order of doing it. Nothing is loaded or changed."""
    recipe = found.recipe
    if recipe.base:
        registry.base(recipe.base)
    steps: list[Step] = []
    going: set[str] = set()
    for name in training_order(recipe):
        newer = [needed for needed in _needs(recipe, found.recipe.train[name].on) if needed in going]
        why = f"{newer[0]} is trained again" if newer else "--force" if force else _why_train(found, registry, name)
        if why:
            going.add(name)
        steps.append(Step("adapter", name, why))
    for name, expression in recipe.stacks.items():
        newer = [needed for needed in _needs(recipe, expression) if needed in going]
        steps.append(
            Step("stack", name, f"{newer[0]} is trained again" if newer else _why_compose(registry, name, expression))
        )
    return steps


def prepare_recipe_job(found: RecipeFile, registry: Registry, name: str) -> PreparedJob:
    return prepare_job(registry, name, found.job(name), folder=found.folder)


def _why_train(found: RecipeFile, registry: Registry, name: str) -> str | None:
    adapter = registry.find_adapter(name)
    prepared = prepare_recipe_job(found, registry, name)
    if not adapter:
        return "not trained yet"
    newest = adapter.newest()
    known = newest.settings or {}
    settings = msgspec.to_builtins(prepared.job.settings())
    changed = [key for key, value in settings.items() if known.get(key) != value]
    if changed:
        return f"other {', '.join(changed)}"
    path = Path(prepared.data)
    if not newest.data or (path.is_file() and files.sha256_file(path) != newest.data.sha256):
        return "other data"
    if newest.fingerprint != prepared.base.fingerprint:
        return "another base"
    if newest.trained_on != prepared.trained_on:
        return (
            f"trained on {'+'.join(newest.trained_on) or 'the base'}, now {'+'.join(prepared.trained_on) or 'the base'}"
        )
    if not registry.weights_path(newest).is_dir():
        return "its weights are missing"
    return None


def _why_compose(registry: Registry, name: str, expression: str) -> str | None:
    stack = registry.find_stack(name)
    if not stack:
        return "not composed yet"
    try:
        resolved = registry.resolve(expression)
    except NotFound as error:
        return error.message
    wanted = [(m.adapter.name, m.version.version, m.version.digest, m.weight) for m in resolved.members]
    same = wanted == [(m.adapter, m.version, m.digest, m.weight) for m in stack.members]
    return None if same else "other members"
