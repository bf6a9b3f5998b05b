"""Push: an adapter or a stack as one commit that anyone can load, or none when nothing changed.

What is there is asked first, what differs is shown, all of it goes up in one commit on top of what was seen, and what
is there afterwards is compared with what lies here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from stackctl.core import Say
from stackctl.core.command_line import CommandLine
from stackctl.core.errors import HubFailure, NotFound, Usage, VerificationFailed
from stackctl.core.provenance import HubSource
from stackctl.hub.bundle import Destination, bundle_adapter, bundle_stack, check_pushable, is_ours, resolve_base_id
from stackctl.hub.card import CARD, CardFacts, combine_facts, facts_of_card
from stackctl.hub.client import Hub, open_hub
from stackctl.hub.repos import Content, Snapshot, sha256
from stackctl.plan.stack_plan import StackPlan
from stackctl.registry.planning import read_plan
from stackctl.registry.resolve import ResolvedStack
from stackctl.registry.store import Registry
from stackctl.registry.versions import record_push
from stackctl.storage import atomic
from stackctl.storage.files import human_bytes

Export = Callable[[StackPlan, Path], object]
Status = Literal["new", "changed", "unchanged", "removed"]


@dataclass(frozen=True)
class PushOptions:
    """How a push is done.

    ``again`` is the command line that repeats it, for hints. ``export`` writes a stack as one PEFT adapter into a new
    folder; an adapter is pushed as it lies. With ``members`` each member of a stack goes along in its own folder.
    ``base_id`` and ``facts`` are what the registry does not know.
    """

    again: CommandLine
    export: Export
    base_id: str | None = None
    facts: CardFacts = field(default_factory=CardFacts)
    members: bool = False
    private: bool = False
    revision: str | None = None
    create_pr: bool = False
    message: str | None = None
    tag: str | None = None
    dry_run: bool = False
    progress: bool = False


@dataclass(frozen=True)
class PushedFile:
    """One file of the repo; ``sha256`` is None for one that is removed."""

    path: str
    bytes: int
    sha256: str | None
    status: Status


@dataclass(frozen=True)
class Pushed:
    """What a push did. ``commit`` is the head when nothing changed; None in a dry run on a repo that is not there."""

    what: str
    repo: str
    commit: str | None
    url: str
    files: tuple[PushedFile, ...]
    outcome: Literal["pushed", "unchanged", "planned"]
    pull_request: str | None = None


def push(registry: Registry, stack: ResolvedStack, repo: str, options: PushOptions, say: Say) -> Pushed:
    """Push one adapter (a single member of weight one) or a stack to a repo on the Hub.

    Raises:
        Usage, Incompatible, VerificationFailed: it cannot be pushed as it is.
        NotFound, HubFailure: the repo's branch is not there; the Hub or the network said no.
    """
    check_pushable(registry, stack)
    base_id = resolve_base_id(registry, stack, options.base_id, options.again)
    what = _name(stack)
    with (
        atomic.scratch_directory() as folder,
        open_hub(repo, again=options.again, writes=True, say=say, progress=options.progress) as hub,
    ):
        if not options.dry_run:
            hub.require_login()
        seen, facts = _look(hub, options, say)
        there = seen or Snapshot()
        if _came_from_here(stack, repo, there, options):
            kept = tuple(PushedFile(f.path, f.size, f.sha256, "unchanged") for f in there.files.values())
            return _finish(registry, stack, hub, options, Pushed(what, repo, there.commit, "", kept, "unchanged"))
        say(f"preparing {what}")
        to = Destination(repo, base_id, combine_facts(options.facts, facts, base_id))
        content = _bundle(registry, stack, to, options, folder)
        files = tuple(_compare(content, there))
        _show(files, repo, say)
        add = {file.path: content[file.path] for file in files if file.status in ("new", "changed")}
        delete = [file.path for file in files if file.status == "removed"]
        if options.dry_run:
            return Pushed(what, repo, there.commit, hub.url, files, "planned")
        if not add and not delete:
            return _finish(registry, stack, hub, options, Pushed(what, repo, there.commit, "", files, "unchanged"))
        if seen is None:
            hub.create(private=options.private)
            there = hub.find() or Snapshot()
        message = options.message or (f"Push {what}" if _is_adapter(stack) else f"Push {what} ({stack.pinned})")
        done = hub.commit(
            add, delete, message=message, parent=there.commit,
            revision=options.revision, create_pr=options.create_pr,
        )  # fmt: skip
        _check_arrived(_look_again(hub, done.oid, options.again), content, delete, options.again)
        outcome: Literal["pushed", "unchanged"] = "unchanged" if done.oid == there.commit else "pushed"
        pushed = Pushed(what, repo, done.oid, done.pull_request or done.url, files, outcome, done.pull_request)
        return _finish(registry, stack, hub, options, pushed)


def prepare(registry: Registry, stack: ResolvedStack, repo: str, options: PushOptions) -> tuple[PushedFile, ...]:
    """What a push of a stack to a new repo would send; asks nobody.

    Raises:
        Usage, Incompatible, VerificationFailed: it cannot be pushed as it is.
    """
    check_pushable(registry, stack)
    base_id = resolve_base_id(registry, stack, options.base_id, options.again)
    to = Destination(repo, base_id, combine_facts(options.facts, CardFacts(), base_id))
    with atomic.scratch_directory() as folder:
        return tuple(_compare(_bundle(registry, stack, to, options, folder), Snapshot()))


def _name(stack: ResolvedStack) -> str:
    """What a pushed thing is called: its label, its stack's name, or its names joined.

    One adapter with a weight is a stack that cannot have the adapter's name.
    """
    if _is_adapter(stack):
        return stack.members[0].label
    return stack.name or (stack.default_name if len(stack.members) > 1 else f"{stack.default_name}-stack")


def _is_adapter(stack: ResolvedStack) -> bool:
    return stack.name is None and len(stack.members) == 1 and stack.members[0].is_plain


def _bundle(
    registry: Registry, stack: ResolvedStack, to: Destination, options: PushOptions, folder: Path
) -> dict[str, Content]:
    if _is_adapter(stack):
        return bundle_adapter(registry, stack.members[0], stack.base, to)
    exported = folder / "sum"
    options.export(read_plan(registry, stack).check(), exported)
    return bundle_stack(registry, stack, _name(stack), to, exported, members=options.members)


# -- before the commit ----------------------------------------------------------------------------------------------


def _look(hub: Hub, options: PushOptions, say: Say) -> tuple[Snapshot | None, CardFacts]:
    """The repo as it is (None: not there) and what its card says. A dry run goes on without the Hub."""
    try:
        seen = hub.find(options.revision)
        if seen is None:
            _check_may_create(hub, options)
            return None, CardFacts()
        if options.private and seen.private is False:
            raise Usage(
                f"{hub.repo} is there already and public, so --private would hide nothing",
                hint=f"make it private first (hf repo settings {hub.repo} --private), or leave --private out",
            )
        return seen, _standing_facts(hub, seen)
    except HubFailure as error:
        if not options.dry_run:
            raise
        say(f"{error.message}: everything is shown as new")
        return None, CardFacts()


def _check_may_create(hub: Hub, options: PushOptions) -> None:
    """A branch, or a pull request, can only be of a repo that is there."""
    if options.revision is not None and hub.find() is not None:
        raise NotFound(
            f"{hub.repo} has no revision '{options.revision}'",
            hint=f"hf repo branch create {hub.repo} {options.revision}",
        )
    if options.create_pr or options.revision not in (None, "main"):
        first = options.again.without("--create-pr").without("--revision", value=True)
        raise NotFound(f"there is no repo {hub.repo} (or you may not see it)", hint=f"make it first: {first}")


def _standing_facts(hub: Hub, seen: Snapshot) -> CardFacts:
    if CARD not in seen.files or seen.commit is None:
        return CardFacts()
    return facts_of_card(hub.download(seen.files[CARD], seen.commit).read_text(errors="replace"))


def _came_from_here(stack: ResolvedStack, repo: str, there: Snapshot, options: PushOptions) -> bool:
    """Whether this is what a pull brought from that very commit: what somebody else wrote there stays as it is."""
    said = options.base_id is not None or options.facts != CardFacts() or options.members
    if not _is_adapter(stack) or there.commit is None or said:
        return False
    return stack.members[0].version.hub == HubSource(repo=repo, commit=there.commit)


def _compare(content: dict[str, Content], there: Snapshot) -> Iterator[PushedFile]:
    for path, what in sorted(content.items()):
        size = what.stat().st_size if isinstance(what, Path) else len(what)
        standing = there.files.get(path)
        status: Status = "new" if standing is None else "unchanged" if standing.holds(what) else "changed"
        yield PushedFile(path, size, sha256(what), status)
    for path, file in sorted(there.files.items()):
        if is_ours(path) and path not in content:
            yield PushedFile(path, file.size, None, "removed")


def _show(files: tuple[PushedFile, ...], repo: str, say: Say) -> None:
    """Files, sizes and what is new, before anything is sent."""
    width = max(len(file.path) for file in files)
    for file in files:
        say(f"  {file.path:<{width}}  {human_bytes(file.bytes):>9}  {file.status}")
    sent = [file for file in files if file.status in ("new", "changed")]
    say(f"{len(sent)} of {len(files)} files ({human_bytes(sum(f.bytes for f in sent))}) differ from {repo}")


# -- after the commit -----------------------------------------------------------------------------------------------


def _look_again(hub: Hub, commit: str, again: CommandLine) -> Snapshot:
    """The repo at the commit that was made.

    Raises:
        HubFailure: it cannot be looked at.
    """
    made = f"commit {commit[:12]} is made, but what the Hub has now cannot be looked at"
    try:
        return hub.at(commit)
    except NotFound as error:  # it was there a moment ago: the Hub is many machines
        raise HubFailure(f"{made} yet", hint=f"look again: {again}") from error
    except HubFailure as error:
        raise HubFailure(f"{made}: {error.message}", hint=error.hint) from error


def _check_arrived(now: Snapshot, content: dict[str, Content], deleted: list[str], again: CommandLine) -> None:
    """Compare the digests that the Hub has with the files here.

    Raises:
        VerificationFailed: a file is not there, or is another.
    """
    wrong = [path for path, what in content.items() if path not in now.files or not now.files[path].holds(what)]
    wrong += [path for path in deleted if path in now.files]
    if wrong:
        raise VerificationFailed(
            f"commit {str(now.commit)[:12]} is there, but the Hub has other bytes than these files: {', '.join(wrong)}",
            hint=f"push them again: {again}",
        )


def _finish(registry: Registry, stack: ResolvedStack, hub: Hub, options: PushOptions, pushed: Pushed) -> Pushed:
    """Tag the commit, and remember where the adapters live now."""
    if pushed.commit is None or options.dry_run:
        return pushed
    if options.tag:
        hub.tag(options.tag, pushed.commit)
    if not pushed.pull_request and options.revision in (None, "main"):
        held = stack.members if _is_adapter(stack) or options.members else ()
        for member in held:
            if member.version.hub != HubSource(repo=pushed.repo, commit=pushed.commit):
                with contextlib.suppress(NotFound):  # somebody removed it meanwhile
                    record_push(registry, member, HubSource(repo=pushed.repo, commit=pushed.commit))
    url = pushed.url or f"{hub.url}/commit/{pushed.commit}"
    return replace(pushed, url=url)
