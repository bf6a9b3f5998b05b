"""The store: find a registry, read and write its small YAML files, hold its lock.

One small file per thing, so that a name resolves by reading one file and a change is one atomic replace. Weights
are put in place first, the entry is written last: what has no entry does not exist.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self, TypeVar

import msgspec

from stackctl.core import Say
from stackctl.core.errors import HubFailure, MergeConflict, NotFound, UnreadableEntry, Usage
from stackctl.core.expressions import parse_name, parse_stack_name
from stackctl.core.fields import SCHEMA
from stackctl.core.schema import Adapter, AdapterVersion, Base, RegistryFile, Removed, Stack
from stackctl.plan.methods import check_method
from stackctl.storage import atomic, files
from stackctl.storage.hashes import DIGESTS_FILE
from stackctl.storage.locks import locked
from stackctl.storage.paths import typed_path
from stackctl.storage.yaml_files import read_yaml

E = TypeVar("E", Base, Adapter, Stack, Removed)
_FILE = "registry.yaml"
_FOLDERS: dict[type, str] = {Base: "bases", Adapter: "adapters", Stack: "stacks", Removed: "removed"}
_KEEP_ONE_SIDE = "keep one side, register the other's weights anew: git checkout --ours {path}; stackctl add {name} DIR"
_IGNORED_BY_GIT = ("weights/", "runs/", "logs/", ".lock", ".tmp-*", DIGESTS_FILE)


def asked_registry(explicit: Path | None) -> Path | None:
    """The folder that was asked for, else that of ``STACKCTL_REGISTRY``, if there is one."""
    return explicit or (typed_path(value) if (value := os.environ.get("STACKCTL_REGISTRY")) else None)


def find_registry(explicit: Path | None) -> Path:
    """The registry in use: what was asked for, else ``STACKCTL_REGISTRY``, else the nearest one upward.

    Raises:
        NotFound: there is none.
    """
    if (asked := asked_registry(explicit)) is not None:
        for folder in (asked, asked / "registry"):
            if (folder / _FILE).is_file():
                return folder.resolve()
        is_file = asked.is_file()
        hint = (
            f"name the folder that holds it: {asked.parent}" if is_file else f"stackctl init {shlex.quote(str(asked))}"
        )
        raise NotFound(f"there is no registry in {asked}", hint=hint)
    try:
        here = Path.cwd()
    except FileNotFoundError:
        raise NotFound("the working directory is gone", hint="go to another one, or name it: --registry DIR") from None
    for parent in (here, *here.parents):
        for folder in (parent / "registry", parent):
            if (folder / _FILE).is_file():
                return folder.resolve()
    raise NotFound("there is no registry here or in a folder above", hint="stackctl init")


def init_registry(folder: Path) -> bool:
    """Make an empty registry; False when one is there already (which is left as it is)."""
    if (folder / _FILE).is_file():
        return False
    if not folder.is_dir() and (folder.exists() or folder.is_symlink()):
        what = "a file" if folder.exists() else "a link to nothing"
        raise Usage(f"{folder} is {what}", hint="choose another folder")
    for name in _FOLDERS.values():
        atomic.make_directory(folder / name)
    atomic.sweep_staging(folder)
    _ignore_in_git(folder / ".gitignore")
    atomic.write_atomic(folder / _FILE, _text({"schema": SCHEMA, "current": None, "defaults": {}}))
    return True


def _ignore_in_git(path: Path) -> None:
    """Keep weights out of git; what somebody's ``.gitignore`` says already stays."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    missing = [line for line in _IGNORED_BY_GIT if line not in text.splitlines()]
    if missing:
        start = text if not text or text.endswith("\n") else text + "\n"
        atomic.write_atomic(path, start + "\n".join(missing) + "\n")


def now() -> str:
    """This moment in UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


FetchBase = Callable[[str, str | None, Say], tuple[Path, str]]
"""A repo on the Hub, its revision and what to tell people with, to the folder of its files here and the commit."""


def _cannot_fetch(repo: str, revision: str | None, say: Say) -> tuple[Path, str]:
    raise HubFailure(f"the base {repo} is on the Hub, and nothing says how to fetch it")


class Registry:
    """A registry on disk. Nothing is kept in memory: every question reads the file that answers it.

    ``fetch_base`` gets the files of a base that is on the Hub; whoever opens the registry says how.
    ``show_reading`` makes what shows how far a reading of many entries is: a function of the share, 0 to 1.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.fetch_base: FetchBase = _cannot_fetch
        self.show_reading: Callable[[], contextlib.AbstractContextManager[Callable[[float], None]]] = _show_nothing

    @classmethod
    def open(cls, explicit: Path | None = None) -> Self:
        return cls(find_registry(explicit))

    # -- one entry ----------------------------------------------------------------------------------------------

    def entry_path(self, kind: type, name: str) -> Path:
        """Where the entry of a name lies, whether it is there or not."""
        return self.root / _FOLDERS[kind] / f"{name}.yaml"

    def has(self, kind: type, name: str) -> bool:
        """Whether there is an entry of that name; it is not read."""
        return self.entry_path(kind, name).is_file()

    def read(self, kind: type[E], name: str) -> E | None:
        """The entry of a name that is known to be one; None when there is none.

        Raises:
            UnreadableEntry: it cannot be read, or does not hold together.
        """
        path, entry = self.entry_path(kind, name), self._read_file(kind, name)
        if entry is None and os.path.lexists(path) and not path.is_file():  # nor was it written this moment
            hint = "put the entry there, or remove what is there"
            raise UnreadableEntry(f"{path} is no file that can be read", hint=hint)
        return entry

    def _read_file(self, kind: type[E], name: str) -> E | None:
        """As :meth:`read`, where what is no file is no entry."""
        path = self.entry_path(kind, name)
        if not path.is_file():
            return None
        try:
            entry = read_yaml(path, kind, schema=SCHEMA)
            if isinstance(entry, Stack):
                check_method(entry.method, entry.options)
        except Usage as error:
            hint = error.hint
            if kind is Adapter and isinstance(error, MergeConflict):
                hint = _KEEP_ONE_SIDE.format(path=shlex.quote(str(path)), name=name)
            raise UnreadableEntry(error.message, hint=hint) from error
        if entry.name != name:
            hint = f"name the file {entry.name}.yaml, or fix the name"
            raise UnreadableEntry(f"{path}: its name is '{entry.name}'", hint=hint)
        if isinstance(entry, Adapter):
            numbers = [version.version for version in entry.versions]
            if not numbers or numbers != sorted(set(numbers)) or numbers[0] < 1:
                raise UnreadableEntry(
                    f"{path}: versions must be there, distinct and ascending",
                    hint="give each a number of its own: a version is what lies in weights/NAME/NUMBER",
                )
        return entry

    def find_base(self, name: str) -> Base | None:
        return self.read(Base, parse_name(name, "base name"))

    def find_adapter(self, name: str) -> Adapter | None:
        return self.read(Adapter, parse_name(name))

    def find_stack(self, name: str) -> Stack | None:
        return self.read(Stack, parse_stack_name(name))

    def find_removed(self, name: str) -> Removed:
        """What an adapter had once: empty when nothing of that name was ever removed."""
        return self.read(Removed, parse_name(name)) or Removed(name=name, given=[])

    def write(self, *entries: Base | Adapter | Stack | Removed) -> None:
        """Replace the files of entries whole, in this order; the lock is held by who changes something.

        All are on the disk before the first is in place, so that a full disk lets none of them happen.
        """
        with contextlib.ExitStack() as placing:  # which puts the last that was entered in place first
            for entry in reversed(entries):
                value = msgspec.to_builtins(entry) | {"schema": SCHEMA}  # whatever schema it was read from
                msgspec.convert(value, type(entry))  # what could not be read again would take all versions with it
                placing.enter_context(atomic.written_after(self.entry_path(type(entry), entry.name), _text(value)))

    def delete(self, kind: type, name: str) -> None:
        """Remove the entry of a name, for good."""
        path = self.entry_path(kind, name)
        path.unlink()
        atomic.fsync_directory(path.parent)

    # -- all entries of a kind ----------------------------------------------------------------------------------

    def names(self, kind: type) -> list[str]:
        """The names of all entries of a kind, in alphabetical order, without reading them."""
        found = files.children(self.root / _FOLDERS[kind])
        return [path.name.removesuffix(".yaml") for path in found if path.suffix == ".yaml" and path.name[0] != "."]

    def bases(self) -> Iterator[Base]:
        return self._all(Base)

    def adapters(self, mentioning: str = "") -> Iterator[Adapter]:
        """Every adapter, by name; with ``mentioning`` only those whose file may hold that text, and more quickly.

        Raises:
            Usage: an entry cannot be read.
        """
        return self._all(Adapter, mentioning)

    def stacks(self, mentioning: str = "") -> Iterator[Stack]:
        """Every stack, as :meth:`adapters`."""
        return self._all(Stack, mentioning)

    def _all(self, kind: type[E], mentioning: str = "") -> Iterator[E]:
        names = self.names(kind)
        with self.show_reading() as progress:
            for number, name in enumerate(names, 1):
                if self._may_mention(kind, name, mentioning) and (entry := self._read_file(kind, name)):
                    yield entry
                progress(number / len(names))

    def _may_mention(self, kind: type, name: str, text: str) -> bool:
        """Whether an entry's file holds some text, as it stands or behind an escape of YAML."""
        if not text:
            return True
        try:
            content = self.entry_path(kind, name).read_bytes()
        except (FileNotFoundError, IsADirectoryError):  # removed this moment, or no entry
            return False
        return text.encode() in content or b"\\" in content

    # -- settings, weights, lock --------------------------------------------------------------------------------

    def settings(self) -> RegistryFile:
        return read_yaml(self.root / _FILE, RegistryFile, schema=SCHEMA)

    def settings_after(self, settings: RegistryFile) -> contextlib.AbstractContextManager[None]:
        """Around a change that these settings follow: on a full disk neither happens (:func:`atomic.written_after`)."""
        if settings == self.settings():
            return contextlib.nullcontext()
        return atomic.written_after(self.root / _FILE, _text(msgspec.to_builtins(settings) | {"schema": SCHEMA}))

    def weights_path(self, version: AdapterVersion) -> Path:
        """Where a version's checkpoint lies, absolute: for a link, in somebody else's folder."""
        path = self.root / version.path
        try:
            return path.resolve()
        except RuntimeError:  # links that lead to each other, where nothing lies
            return path

    @staticmethod
    def relative_weights_path(name: str, number: int | str) -> str:
        """Where a version's checkpoint lies below the registry when it is the registry's own."""
        return f"weights/{name}/{number}"

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the registry for writing. Readers need no lock: every file is replaced whole.

        What killed writers left is swept on the way.

        Raises:
            NotFound, Usage: ``registry.yaml`` is gone or cannot be read: a change that ends with it would stop halfway.
        """
        if not (self.root / _FILE).is_file():
            raise NotFound(f"{self.root / _FILE} is gone", hint=f"stackctl init {shlex.quote(str(self.root))}")
        with locked(self.root / ".lock", "the registry"):
            self.settings()
            self.sweep()
            yield

    def sweep(self) -> None:
        """Remove what killed writers left."""
        for folder in (self.root, *(self.root / name for name in _FOLDERS.values()), self.root / "weights"):
            atomic.sweep_staging(folder)


def _text(entry: dict[str, Any]) -> str:
    """The text of an entry's file. What it takes is imported only here: most commands write nothing."""

    from stackctl.storage.yaml_text import format_entry

    return format_entry(entry)


@contextlib.contextmanager
def _show_nothing() -> Iterator[Callable[[float], None]]:
    yield lambda share: None
