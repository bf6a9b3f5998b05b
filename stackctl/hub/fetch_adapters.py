"""Adapters of a repo on the Hub into this registry: fetched, checked, registered, or given their files back.

The weights of all are fetched and checked, and only when all of it is whole is anything registered.
"""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from stackctl.core import Say
from stackctl.core.command_line import CommandLine
from stackctl.core.errors import Incompatible, NotFound
from stackctl.core.expressions import Reference, Term, format_term, parse_reference
from stackctl.core.provenance import HubSource
from stackctl.core.schema import AdapterVersion, Base, CheckpointMember, GivenNumber
from stackctl.hub.repo_contents import RepoAdapter, RepoReader
from stackctl.lora.checkpoint import Checkpoint, read_checkpoint
from stackctl.lora.convertible import convert_hint, kind_of
from stackctl.plan.build import plan_stack
from stackctl.plan.stack_plan import PlanMember
from stackctl.registry.adapters import ResolvedMember, find_digest, foundations, resolve_adapter
from stackctl.registry.restore import own_folder, restore_files
from stackctl.registry.store import Registry
from stackctl.registry.versions import add_version, entry_of
from stackctl.storage import atomic, files


@dataclass(frozen=True)
class AdapterFetcher:
    """Brings adapters of one repo at one commit; ``dry_run`` shows what would be fetched, and fetches nothing.

    ``again`` is the command line that repeats what is being done, for hints; ``folder`` of the repo was asked for.
    """

    registry: Registry
    repo: RepoReader
    folder: str
    again: CommandLine
    dry_run: bool
    say: Say

    def register(self, parts: list[RepoAdapter], base: Base) -> list[ResolvedMember]:
        """Fetch and check all parts, then register them, what others stand on first."""
        self._show(parts)
        outside = self._foundations(parts)
        if self.dry_run:
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

    def restore(self, damaged: dict[str, tuple[ResolvedMember, RepoAdapter]]) -> list[str]:
        """Give registered versions their files back. Returns their labels.

        Raises:
            VerificationFailed: what the repo holds is not what was registered.
        """
        self._show(part for _, part in damaged.values())
        for member, part in damaged.values() if not self.dry_run else ():
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
                hint=f"fetch it: hf download {self.repo.hub.repo} --local-dir FOLDER; then {then}",
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
            told = {m.label: m for m in part.info.trained_on} if part.info else {}
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
            hint=f"{where}, then: {self.again}",
        )

    def _register(self, part: RepoAdapter, checkpoint: Checkpoint, base: Base, on: list[str]) -> AdapterVersion:
        digest = part.digest or checkpoint.digest()
        place = HubSource(repo=self.repo.hub.repo, commit=self.repo.commit, folder=self.folder or None)

        def build(number: int) -> AdapterVersion:
            path = self.registry.relative_weights_path(part.name, number)
            return msgspec.structs.replace(
                part.entry or entry_of(number, path, checkpoint, base, on), version=number, digest=digest, path=path,
                base=base.name, fingerprint=base.fingerprint, trained_on=on, bytes=checkpoint.bytes, hub=place,
                pushed=None,
            )  # fmt: skip

        staged, described = checkpoint.path, part.description or None
        given = GivenNumber(version=part.number, digest=digest)
        return add_version(self.registry, part.name, build, staged, described, given)


def _terms(part: RepoAdapter) -> tuple[Term, ...]:
    """What a part was trained on, by the names of where it was made."""
    return foundations(part.entry) if part.entry else ()


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
