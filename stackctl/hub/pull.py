"""Pull: what a repo on the Hub holds, as registered versions, pinned to the commit.

Everything small is looked at first (what it is, on which base, whether it is here already), then the weights are
fetched and checked, and only when all of it is whole is anything registered. What is registered already and has lost
its files, as in a clone whose weights git leaves out, gets them back and stays the version that it is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from stackctl.core import Say
from stackctl.core.command_line import CommandLine
from stackctl.core.errors import Incompatible, NotFound, StackctlError, Usage, attempt, did_you_mean, raise_all
from stackctl.core.expressions import format_expression, parse_name, parse_stack_name
from stackctl.core.schema import Base, Member, Stack
from stackctl.hub.bundle import STACK
from stackctl.hub.client import Hub, open_hub
from stackctl.hub.fetch_adapters import AdapterFetcher
from stackctl.hub.published import MEMBERS
from stackctl.hub.repo_contents import RepoAdapter, RepoReader
from stackctl.hub.repos import RepoPlace, Snapshot
from stackctl.lora.checkpoint import CONFIG
from stackctl.plan.methods import SUM, check_method, compose_command
from stackctl.registry.adapters import ResolvedMember, find_digest
from stackctl.registry.base_entries import resolve_base
from stackctl.registry.base_matching import StatedBase, choose_base
from stackctl.registry.checkpoint_files import damaged_members
from stackctl.registry.resolve import ResolvedStack
from stackctl.registry.stacks import put_stack
from stackctl.registry.store import Registry
from stackctl.registry.versions import check_adapter_name


@dataclass(frozen=True)
class PullOptions:
    """How a pull is done. ``again`` is the command line that repeats it, for hints."""

    again: CommandLine
    name: str | None = None
    base: str | None = None
    dry_run: bool = False
    progress: bool = False


@dataclass(frozen=True)
class Pulled:
    """What a pull brought: the labels that are new here, and those that were here without whole files."""

    repo: str
    commit: str
    folder: str = ""
    adapter: str | None = None
    version: int | None = None
    digest: str | None = None
    stack: str | None = None
    members: tuple[ResolvedMember, ...] = ()
    added: tuple[str, ...] = ()
    restored: tuple[str, ...] = ()
    planned: bool = False


def pull(registry: Registry, place: RepoPlace, options: PullOptions, say: Say) -> Pulled:
    """Register what a repo, or a folder of it, holds; what is here already, by its digest, is not registered twice.

    Raises:
        NotFound: no such repo, revision, folder or base.
        Incompatible: it holds no adapter that can be used here.
        VerificationFailed: bytes are not what their digest says.
        HubFailure: the Hub or the network said no.
    """
    problems: list[StackctlError] = []
    if options.name is not None:
        attempt(problems, parse_stack_name, options.name)
    if options.base is not None:
        attempt(problems, resolve_base, registry, options.base)
    raise_all(problems)
    with open_hub(place.repo, again=options.again, writes=False, say=say, progress=options.progress) as hub:
        seen = _look(hub, place)
        if seen is None:
            raise NotFound(
                f"there is no repo '{place.repo}'{f' with a revision {place.revision}' if place.revision else ''}",
                hint="check the name; for a private repo: hf auth login",
            )
        return _Pull(registry, RepoReader(hub, seen), place, options, say).run()


def _look(hub: Hub, place: RepoPlace) -> Snapshot | None:
    """The repo at the revision that was asked for.

    Raises:
        NotFound: the repo has no such revision; the hint names the nearest that it has.
    """
    try:
        return hub.find(place.revision)
    except NotFound as error:
        known = hub.revisions()
        near = did_you_mean(place.revision or "", known, error.hint or "")
        raise NotFound(error.message, hint=near) from None


class _Pull:
    """One pull: the repo at one commit, and the registry that it goes into."""

    def __init__(self, registry: Registry, repo: RepoReader, place: RepoPlace, options: PullOptions, say: Say) -> None:
        self.registry, self.hub, self.options, self.say = registry, repo.hub, options, say
        self.repo, self.asked = repo, place
        self.fetcher = AdapterFetcher(registry, repo, place.folder, options.again, options.dry_run, say)

    def run(self) -> Pulled:
        if not self.options.dry_run:
            self.registry.sweep()
        recipe = None if self.asked.folder else self.repo.read(STACK, Stack)
        if recipe is not None:
            found = self._member_parts(recipe)
            if found is not None:
                return self._pull_stack(recipe, *found)
            self.say(f"{self.hub.repo} has the stack '{recipe.name}' as one adapter, without its members")
        return self._pull_adapter(recipe)

    # -- an adapter -------------------------------------------------------------------------------------------------

    def _pull_adapter(self, recipe: Stack | None) -> Pulled:
        name = self.options.name or (recipe.name.replace("+", "-")[:64] if recipe else None)
        part = self.repo.part(self.repo.adapter_folder(self.asked, self.options.again), name, self.asked.folder)
        self._check_adapter_name(part.name)
        known = self._known(part)
        done = replace(self._done([]), adapter=part.name, version=part.number, digest=part.digest)
        if known is None:
            brought = self.fetcher.register([part], self._base(part, recipe))
            if self.options.dry_run:
                return replace(done, added=(part.label,))
            known = brought[0]
            done = replace(done, added=(known.label,))
        elif damaged_members(self.registry, [known]):
            done = replace(done, restored=tuple(self.fetcher.restore({known.label: (known, part)})))
        version = known.version
        return replace(done, adapter=known.adapter.name, version=version.version, digest=version.digest)

    def _base(self, part: RepoAdapter, recipe: Stack | None) -> Base:
        """The base that was asked for, else the one that an adapter of the repo says it was trained on."""
        if self.options.base is not None:
            return resolve_base(self.registry, self.options.base)
        stated = StatedBase.of(part.config, part.info, part.entry, recipe)
        base, unknown = choose_base(self.registry, stated, lambda: part.digest)
        if unknown:
            told = f"it says that its base is '{unknown}'; it is registered on '{base.name}'"
            self.say(f"note: {told} (--base chooses another)")
        return base

    def _known(self, part: RepoAdapter) -> ResolvedMember | None:
        """The same adapter in this registry: under the name that was asked for, else under any."""
        if part.digest is None:
            return None
        if self.options.name is None:
            return find_digest(self.registry, part.digest)
        adapter = self.registry.find_adapter(part.name)
        same = [v for v in adapter.versions if v.digest == part.digest] if adapter else []
        return ResolvedMember(adapter, same[0], 1.0) if adapter and same else None

    def _check_adapter_name(self, name: str) -> None:
        try:
            check_adapter_name(self.registry, name)
        except Usage as error:
            hint = f"choose another name: {self.options.again.having('--name', 'NAME')}"
            raise Usage(error.message, hint=hint) from None

    # -- a stack ----------------------------------------------------------------------------------------------------

    def _member_parts(self, recipe: Stack) -> tuple[str, list[RepoAdapter]] | None:
        """What a recipe's stack is called here, and its members that are not registered here; None when some are
        neither here nor in the repo."""
        if not recipe.members:
            raise Incompatible(f"the stack in {self.hub.repo} has no members")
        try:
            names = [parse_name(member.adapter) for member in recipe.members]
            parse_stack_name(recipe.name, "+".join(names))
            check_method(recipe.method, recipe.options)
        except Usage as error:
            raise Incompatible(f"{STACK} of {self.hub.repo}: {error.message}", hint=error.hint) from None
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise Incompatible(f"{STACK} of {self.hub.repo} has {', '.join(twice)} twice", hint="ask for a new push")
        here = [find_digest(self.registry, member.digest) for member in recipe.members]
        missing = [member for member, found in zip(recipe.members, here, strict=True) if found is None]
        if not all(self._holds(member) for member in missing):
            return None
        # Without a name of its own it is called after its members, some of which may be here under other names.
        own = "+".join(found.adapter.name if found else name for found, name in zip(here, names, strict=True))
        name = parse_stack_name(self.options.name or (own if "+" in recipe.name else recipe.name), own)
        self._check_stack_name(name, names)
        for member in missing:
            check_adapter_name(self.registry, member.adapter)
        return name, [self._member_part(member) for member in missing]

    def _holds(self, member: Member) -> bool:
        return f"{MEMBERS}/{member.adapter}/{CONFIG}" in self.repo.seen.files

    def _member_part(self, member: Member) -> RepoAdapter:
        part = self.repo.part(f"{MEMBERS}/{member.adapter}", member.adapter)
        if part.digest not in (None, member.digest):
            raise self.repo.other_digest(part.folder)
        return replace(part, number=member.version, digest=member.digest)

    def _check_stack_name(self, name: str, members: list[str]) -> None:
        if name in members or ("+" not in name and self.registry.find_adapter(name) is not None):
            hint = f"name the stack: {self.options.again.having('--name', 'NAME')}"
            raise Usage(f"'{name}' is the name of an adapter", hint=hint)

    def _pull_stack(self, recipe: Stack, name: str, parts: list[RepoAdapter]) -> Pulled:
        restored = self.fetcher.restore(self._damaged_members(recipe))
        brought: list[ResolvedMember] = []
        if parts:
            brought = self.fetcher.register(parts, self._base(parts[0], recipe))
        if self.options.dry_run:
            return replace(self._done([part.label for part in parts]), stack=name, restored=tuple(restored))
        added = [member.label for member in brought]
        members = []
        for member in recipe.members:
            found = find_digest(self.registry, member.digest)
            if found is None:
                raise NotFound(f"{member.label} was removed meanwhile", hint=str(self.options.again))
            members.append(replace(found, weight=member.weight, layer_weights=member.layer_weights))
        own = resolve_base(self.registry, members[0].version.base)
        stack = ResolvedStack(name, own, tuple(members), name, method=recipe.method, options=recipe.options)
        entry = stack.entry(name, recipe.created)
        before = put_stack(self.registry, entry)
        if before is not None and before.recipe != entry.recipe:
            old = format_expression(before.members) + (f" by {before.method}" if before.method != SUM else "")
            again = compose_command(before, "NAME")
            back = f"to have that back: {again}" if again else "its weights by layer are gone"
            self.say(f"note: '{name}' was {old} ({back})")
        if before is None or before.recipe != entry.recipe:
            added = [*added, name]
        return replace(self._done(added), stack=name, members=tuple(members), restored=tuple(restored))

    def _damaged_members(self, recipe: Stack) -> dict[str, tuple[ResolvedMember, RepoAdapter]]:
        """The members that are registered here without whole files, with what the repo has of them."""
        here = {m.digest: found for m in recipe.members if (found := find_digest(self.registry, m.digest))}
        damaged = {member.version.digest: member for member in damaged_members(self.registry, here.values())}
        held = {m.digest: m for m in recipe.members if m.digest in damaged and self._holds(m)}
        if absent := [member.label for digest, member in damaged.items() if digest not in held]:
            self.say(
                f"note: the files of {', '.join(absent)} are missing or changed, and {self.hub.repo} does not hold "
                "them: stackctl verify --repair"
            )
        return {damaged[digest].label: (damaged[digest], self._member_part(member)) for digest, member in held.items()}

    def _done(self, added: list[str]) -> Pulled:
        return Pulled(
            self.hub.repo, self.repo.commit, self.asked.folder, added=tuple(added), planned=self.options.dry_run
        )
