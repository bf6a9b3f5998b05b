"""Pull: what a repo on the Hub holds, as registered versions, pinned to the commit.

Everything small is looked at first (what it is, on which base, whether it is here already), then the weights are
fetched and checked, and only when all of it is whole is anything registered. What is registered already and has lost
its files, as in a clone whose weights git leaves out, gets them back and stays the version that it is.
"""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from stackctl.core.command_line import CommandLine
from stackctl.core.errors import Incompatible, NotFound, Usage
from stackctl.core.expressions import (
    Reference,
    Term,
    format_term,
    parse_expression,
    parse_name,
    parse_reference,
    parse_stack_name,
)
from stackctl.core.schema import AdapterVersion, Base, CheckpointMember, GivenNumber, HubSource, Member, Stack
from stackctl.hub.bundle import MEMBERS, STACK
from stackctl.hub.client import open_hub
from stackctl.hub.http_client import Say
from stackctl.hub.repo_contents import RepoAdapter, RepoReader
from stackctl.hub.repo_place import RepoPlace
from stackctl.lora.checkpoint import CONFIG, Checkpoint, read_checkpoint
from stackctl.lora.convertible import convert_hint, kind_of
from stackctl.lora.lora_config import describe_lora
from stackctl.plan.build import plan_stack
from stackctl.plan.model import PlanMember
from stackctl.registry.adapters import ResolvedMember, find_digest, resolve_adapter
from stackctl.registry.base_entries import resolve_base
from stackctl.registry.base_matching import StatedBase, find_stated_base
from stackctl.registry.checkpoint_files import damaged_members
from stackctl.registry.restore import own_folder, restore_files
from stackctl.registry.stacks import put_stack
from stackctl.registry.store import Registry, now
from stackctl.registry.versions import add_version, check_adapter_name
from stackctl.storage import atomic, files


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
    if options.name is not None:
        parse_stack_name(options.name)
    with open_hub(place.repo, again=options.again, writes=False, say=say, progress=options.progress) as hub:
        seen = hub.find(place.revision)
        if seen is None:
            raise NotFound(
                f"there is no repo '{place.repo}'{f' with a revision {place.revision}' if place.revision else ''}",
                hint="check the name; for a private repo: hf auth login",
            )
        return _Pull(registry, RepoReader(hub, seen), place, options, say).run()


class _Pull:
    """One pull: the repo at one commit, and the registry that it goes into."""

    def __init__(self, registry: Registry, repo: RepoReader, place: RepoPlace, options: PullOptions, say: Say) -> None:
        self.registry, self.hub, self.options, self.say = registry, repo.hub, options, say
        self.repo, self.asked = repo, place
        self.place = HubSource(repo=repo.hub.repo, commit=repo.commit, folder=place.folder or None)

    def run(self) -> Pulled:
        if not self.options.dry_run:
            self.registry.sweep()
        recipe = None if self.asked.folder else self.repo.read(STACK, Stack)
        if recipe is not None:
            parts = self._member_parts(recipe)
            if parts is not None:
                return self._pull_stack(recipe, parts)
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
            brought = self._bring([part], self._base(part, recipe))
            if self.options.dry_run:
                return replace(done, added=(part.label,))
            known = brought[0]
            done = replace(done, added=(known.label,))
        elif damaged_members(self.registry, [known]):
            done = replace(done, restored=tuple(self._restore({known.label: (known, part)})))
        return replace(
            done, adapter=known.adapter.name, version=known.version.version, digest=known.version.digest
        )  # fmt: skip

    def _base(self, part: RepoAdapter, recipe: Stack | None) -> Base:
        """The base that was asked for, else the one that an adapter of the repo says it was trained on."""
        if self.options.base is not None:
            return resolve_base(self.registry, self.options.base)
        stated = StatedBase.of(part.config, part.entry, part.info, recipe)
        return find_stated_base(self.registry, stated, self.say)

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

    def _member_parts(self, recipe: Stack) -> list[RepoAdapter] | None:
        """The members of a recipe that are not registered here; None when some are neither here nor in the repo."""
        if not recipe.members:
            raise Incompatible(f"the stack in {self.hub.repo} has no members")
        try:
            parse_stack_name(recipe.name)
            names = [parse_name(member.adapter) for member in recipe.members]
        except Usage as error:
            raise Incompatible(f"{STACK} of {self.hub.repo}: {error.message}", hint=error.hint) from None
        missing = [m for m in recipe.members if find_digest(self.registry, m.digest) is None]
        if not all(self._holds(member) for member in missing):
            return None
        self._check_stack_name(self.options.name or recipe.name, names)
        for member in missing:
            check_adapter_name(self.registry, member.adapter)
        return [self._member_part(member) for member in missing]

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

    def _pull_stack(self, recipe: Stack, parts: list[RepoAdapter]) -> Pulled:
        name = self.options.name or recipe.name
        restored = self._restore(self._damaged_members(recipe))
        brought: list[ResolvedMember] = []
        if parts:
            brought = self._bring(parts, self._base(parts[0], recipe))
        if self.options.dry_run:
            return replace(self._done([part.label for part in parts]), stack=name, restored=tuple(restored))
        added = [member.label for member in brought]
        members = []
        for member in recipe.members:
            found = find_digest(self.registry, member.digest)
            if found is None:
                raise NotFound(f"{member.adapter}@{member.version} was removed meanwhile", hint=str(self.options.again))
            members.append(replace(found, weight=member.weight, layer_weights=member.layer_weights))
        own = resolve_base(self.registry, members[0].version.base)
        entry = Stack(
            name=name, base=own.name, fingerprint=own.fingerprint, method=recipe.method, options=recipe.options,
            created=recipe.created,
            members=[member.entry() for member in members],
        )  # fmt: skip
        before = put_stack(self.registry, entry)
        if before is not None and before.members != entry.members:
            old = "+".join(format_term(f"{m.adapter}@{m.version}", m.weight) for m in before.members)
            back = f"to have that back: stackctl compose {old} --name NAME"
            if any(m.layer_weights for m in before.members):
                back = "its weights by layer are gone"
            self.say(f"note: '{name}' was {old} ({back})")
        if before is None or before.members != entry.members:
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

    # -- fetching and registering -----------------------------------------------------------------------------------

    def _done(self, added: list[str]) -> Pulled:
        return Pulled(
            self.hub.repo,
            self.repo.commit,
            self.asked.folder,
            added=tuple(added),
            planned=self.options.dry_run,
        )

    def _bring(self, parts: list[RepoAdapter], base: Base) -> list[ResolvedMember]:
        """Fetch and check all parts, then register them, what others stand on first."""
        self._show(parts)
        outside = self._foundations(parts)
        if self.options.dry_run:
            return []
        weights = self.registry.root / "weights"
        found, labels = [], dict[str, str]()
        with contextlib.ExitStack() as stack:
            staged = {part.folder: stack.enter_context(atomic.staging_directory(weights)) for part in parts}
            for part in parts:
                self.repo.fetch(part, staged[part.folder])
            checkpoints = {part.folder: self._checked(part, staged[part.folder], base) for part in parts}
            for part in _foundations_first(parts):
                on = [format_term((labels | outside)[str(t.reference)], t.weight) for t in _terms(part)]
                version = self._register(part, checkpoints[part.folder], base, on)
                member = resolve_adapter(self.registry, Reference(part.name, version.version))
                labels[part.label] = member.label
                found.append(member)
                if part.entry and member.label != part.label:
                    self.say(f"note: {part.label} is another adapter here; what was pulled is {member.label}")
        return found

    def _show(self, parts: Iterable[RepoAdapter]) -> None:
        for part in parts:
            for file in part.files.values():
                self.say(f"  {file.path:<48}  {files.human_bytes(file.size):>9}")

    def _restore(self, damaged: dict[str, tuple[ResolvedMember, RepoAdapter]]) -> list[str]:
        """Give registered versions their files back. Returns their labels.

        Raises:
            VerificationFailed: what the repo holds is not what was registered.
        """
        self._show(part for _, part in damaged.values())
        for member, part in damaged.values() if not self.options.dry_run else ():
            with atomic.staging_directory(self.registry.root / "weights") as staged:
                self.repo.fetch(part, staged, own_folder(self.registry, member))
                restore_files(self.registry, member, staged)
        return list(damaged)

    def _checked(self, part: RepoAdapter, folder: Path, base: Base) -> Checkpoint:
        """A staged checkpoint, if it has the digest that was promised and fits the base.

        Raises:
            VerificationFailed, Incompatible: it has not, or does not.
        """
        checkpoint = read_checkpoint(folder)
        if part.digest is not None and checkpoint.digest() != part.digest:
            raise self.repo.other_digest(part.folder)
        plan = plan_stack(base, [PlanMember(part.name, 1.0, checkpoint, part.name)])
        if plan.errors and kind_of(checkpoint.config):
            then = convert_hint(checkpoint.config, part.name, Path("FOLDER"))
            raise Incompatible(
                "; ".join(p.message for p in plan.errors),
                hint=f"fetch it: hf download {self.hub.repo} --local-dir FOLDER; then {then}",
            )
        plan.check()
        return checkpoint

    def _foundations(self, parts: list[RepoAdapter]) -> dict[str, str]:
        """What the parts were trained on and do not bring themselves: its label there to its label here.

        Raises:
            Incompatible: another adapter has that label here.
        """
        together = {part.label for part in parts}
        found: dict[str, str] = {}
        for part in parts:
            told = {f"{m.adapter}@{m.version}": m for m in part.info.trained_on} if part.info else {}
            for label in dict.fromkeys(str(term.reference) for term in _terms(part)):
                if label not in together and label not in found:
                    found[label] = self._foundation(part, label, told.get(label))
        return found

    def _foundation(self, part: RepoAdapter, label: str, told: CheckpointMember | None) -> str:
        digest = told.digest if told else ""
        if digest and (here := find_digest(self.registry, digest)):
            return here.label
        where = (
            f"stackctl pull {shlex.quote(told.repo)}"
            if told and told.repo
            else "ask its author for it, or for a --members push"
        )
        try:
            taken = resolve_adapter(self.registry, parse_reference(label))
        except NotFound:
            self.say(f"note: {part.label} needs {label}, which is not here: {where}")
            return label
        if not digest:
            return taken.label
        raise Incompatible(
            f"{part.label} was trained on another {label} than the one that is here (digests differ)",
            hint=f"{where}, then: {self.options.again}",
        )

    def _register(self, part: RepoAdapter, checkpoint: Checkpoint, base: Base, on: list[str]) -> AdapterVersion:
        peft = part.config.get("peft_version")
        entry = part.entry or AdapterVersion(
            version=1, digest="", path="", base="", fingerprint="", created=now(), lora=describe_lora(part.config),
            parameters=checkpoint.parameters, dtype=checkpoint.dtype, versions={"peft": str(peft)} if peft else {},
        )  # fmt: skip

        digest = part.digest or checkpoint.digest()

        def build(number: int) -> AdapterVersion:
            return msgspec.structs.replace(
                entry, version=number, digest=digest,
                path=self.registry.relative_weights_path(part.name, number), base=base.name,
                fingerprint=base.fingerprint, trained_on=on, bytes=checkpoint.bytes, hub=self.place, pushed=None,
            )  # fmt: skip

        staged, described = checkpoint.path, part.description or None
        given = GivenNumber(version=part.number, digest=digest)
        return add_version(self.registry, part.name, build, staged, described, given)


def _terms(part: RepoAdapter) -> tuple[Term, ...]:
    """What a part was trained on, by the names of where it was made."""
    return parse_expression("+".join(part.entry.trained_on)) if part.entry and part.entry.trained_on else ()


def _foundations_first(parts: list[RepoAdapter]) -> list[RepoAdapter]:
    """The parts in an order in which each comes after those of them that it was trained on."""
    waiting, ordered = {part.label: part for part in parts}, list[RepoAdapter]()
    while waiting:
        ready = [
            part for part in waiting.values()
            if not any(str(term.reference) in waiting for term in _terms(part))
        ] or list(waiting.values())  # fmt: skip
        ordered += ready
        for part in ready:
            del waiting[part.label]
    return ordered
