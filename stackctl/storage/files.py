"""Files that are never half there: atomic writes, staging folders, digests, safe paths.

Unfinished work carries a name that no reader looks at, and a lock of the kernel that goes with the process, however it
ends. So what a killed process left is told from what another is writing now, and swept at once.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import itertools
import json
import os
import platform
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from stackctl.core.errors import Failed, NotFound, Usage, closest

STAGING_PREFIX = ".tmp-"
"""Whatever carries this prefix is unfinished work of some process and may be swept once that process is gone."""

_LONGEST_NAME = 300
"""Characters of a path that a message shows; what is longer is cut in the middle."""
_CHUNK = 1 << 20
_FIRST = 64 << 10
_LOOKED_AT = 1000
"""Names in a folder that a mistyped one is compared with."""
_STALE_AFTER_SECONDS = 24 * 3600
_SETTLED_SECONDS = 2.0
"""A file system's clock may give two changes one time, when one follows the other at once."""


def fsync_directory(path: Path) -> None:
    """Make a rename inside ``path`` survive a power cut (a no-op where folders cannot be opened)."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def make_directory(path: Path) -> None:
    """Make a folder and those above it, each of which survives a power cut."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        fsync_directory(folder.parent)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a whole file or nothing: a temporary sibling, flushed, then renamed over ``path``."""
    data = content.encode() if isinstance(content, str) else content
    make_directory(path.parent)
    temporary, descriptor = _claim(lambda: tempfile.mkstemp(prefix=_own_prefix(), dir=path.parent)[::-1])
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
            temporary.chmod(0o666 & ~_umask())
            temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    fsync_directory(path.parent)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def _own_prefix() -> str:
    """The prefix of what this machine is working on: locks need not reach from one machine to another."""
    return f"{STAGING_PREFIX}{hashlib.sha256(platform.node().encode()).hexdigest()[:8]}-"


def _claim(make: Callable[[], tuple[str, int]]) -> tuple[Path, int]:
    """Make something unfinished and lock it, for as long as its descriptor is open."""
    while True:
        name, descriptor = make()
        with contextlib.suppress(OSError):  # not every file system has locks: age tells there
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(Path(name).stat(), os.fstat(descriptor)):
                return Path(name), descriptor
        os.close(descriptor)  # swept in the moment between making and locking it


def _make_staging(parent: Path) -> tuple[str, int]:
    while True:
        name = tempfile.mkdtemp(prefix=_own_prefix(), dir=parent)
        with contextlib.suppress(FileNotFoundError):
            return name, os.open(name, os.O_RDONLY | os.O_DIRECTORY)


@contextlib.contextmanager
def staging_directory(parent: Path) -> Iterator[Path]:
    """A private folder beside the place where its content will end; gone afterwards unless it was renamed away.

    What killed processes left in ``parent`` is swept first.
    """
    make_directory(parent)
    sweep_staging(parent)
    path, descriptor = _claim(lambda: _make_staging(parent))
    try:
        path.chmod(0o777 & ~_umask())
        yield path
    finally:
        if path.exists():
            shutil.rmtree(path, ignore_errors=True)
        os.close(descriptor)


def publish_directory(staged: Path, final: Path) -> None:
    """Flush every file of ``staged`` and give the folder its final name in one rename.

    Raises:
        Usage: ``final`` exists and is not an empty folder.
    """
    for path in [*staged.rglob("*")]:
        if path.is_file() and not path.is_symlink():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
        elif path.is_dir():
            fsync_directory(path)
    fsync_directory(staged)
    make_directory(final.parent)
    if final.is_dir() and not any(final.iterdir()):
        final.rmdir()
    if final.exists() or final.is_symlink():
        raise Usage(f"{final} already exists", hint="choose another folder, or remove it first")
    staged.rename(final)
    fsync_directory(final.parent)


def put_in_place(staged: Path, final: Path) -> None:
    """Flush a finished file and rename it over ``final``, in a folder that is there."""
    with staged.open("rb") as stream:
        os.fsync(stream.fileno())
    staged.replace(final)
    fsync_directory(final.parent)


def sweep_staging(parent: Path, *, dry_run: bool = False) -> list[Path]:
    """Remove what killed processes left in ``parent``, and return it; what somebody is working on stays."""
    swept = []
    for path in children(parent, STAGING_PREFIX):
        with contextlib.suppress(OSError), _abandoned(path) as is_abandoned:
            if is_abandoned:
                if not dry_run:
                    remove_tree(path)
                swept.append(path)
    return swept


@contextlib.contextmanager
def _abandoned(path: Path) -> Iterator[bool]:
    """Whether nobody works on something unfinished; while the body runs, nobody can begin to."""
    info = path.lstat()
    is_old = time.time() - info.st_mtime > _STALE_AFTER_SECONDS
    if not (stat.S_ISDIR(info.st_mode) or stat.S_ISREG(info.st_mode)):
        yield is_old
        return
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        is_locked, has_locks = False, True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            is_locked = True
        except OSError:  # NFS, for one, locks nothing that is open for reading only
            has_locks = False
        yield not is_locked and (is_old or (has_locks and path.name.startswith(_own_prefix())))
    finally:
        os.close(descriptor)


def remove_tree(path: Path) -> None:
    """Remove a file, a link or a folder; a link's target is never followed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def discard(path: Path) -> None:
    """Remove a folder that others may look for, so that none of them ever finds half of it.

    Raises:
        FileNotFoundError: somebody else was quicker.
    """
    hidden = path.with_name(f"{_own_prefix()}{os.getpid()}-{path.name}")
    path.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)  # what cannot be removed, or what a kill leaves, is swept later


MAX_TEXT_BYTES = 32 << 20
"""More than any file that people write or that describes a model; parsed, each byte may take twenty of memory."""


def read_bounded(path: Path) -> bytes:
    """A file of reasonable size, whole; a pipe is read to its end, and ``/dev/zero`` is not.

    Raises:
        Usage: it has more than ``MAX_TEXT_BYTES``. OSError: as for any file.
    """
    with path.open("rb") as stream:
        data = stream.read(_FIRST)
        if len(data) == _FIRST:  # memory for all that might come costs more than reading what most files have
            data += stream.read(MAX_TEXT_BYTES + 1 - _FIRST)
    if len(data) > MAX_TEXT_BYTES:
        raise Usage(f"{path} is larger than {MAX_TEXT_BYTES >> 20} MiB", hint="this is another kind of file")
    return data


def read_own_json(path: Path) -> Any:
    """A JSON file of stackctl's own that only helps; None where there is none that can be read."""
    try:
        return json.loads(read_bounded(path)) if path.is_file() else None
    except (OSError, ValueError, RecursionError, Usage):
        return None


def children(folder: Path, beginning: str = "") -> list[Path]:
    """What is in a folder and has a name that begins so, by name; nothing in one that is gone, or is none."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as found:
        return [folder / name for name in sorted(each.name for each in found if each.name.startswith(beginning))]
    return []


def tree_bytes(path: Path) -> int:
    """The bytes of a file or of all files of a folder; links count as themselves."""
    found = [path] if path.is_symlink() or not path.is_dir() else []
    if not found:
        found = [Path(folder, name) for folder, folders, names in os.walk(path) for name in [*folders, *names]]
    size = 0
    for each in found:
        with contextlib.suppress(OSError):  # gone meanwhile
            info = each.lstat()
            size += 0 if stat.S_ISDIR(info.st_mode) else info.st_size
    return size


def state(info: os.stat_result) -> tuple[int, int, int, int]:
    """What a file's content cannot change without: its size, its inode, its time and that of its inode's change.

    The last of them cannot be set back, short of setting the machine's clock.
    """
    return info.st_size, info.st_ino, info.st_mtime_ns, info.st_ctime_ns


def is_settled(info: os.stat_result, now: float) -> bool:
    """Whether a file's next change is sure to show in its :func:`state`, as it was at the time ``now``."""
    return now - max(info.st_mtime, info.st_ctime) > _SETTLED_SECONDS


def sha256_bytes(data: bytes) -> str:
    """``sha256:<hex>`` of some bytes."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def sha256_file(path: Path, read: Callable[[int], None] = lambda _: None) -> str:
    """``sha256:<hex>`` of a file, read in pieces; ``read`` is called with the bytes of each."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(_CHUNK):
            digest.update(piece)
            read(len(piece))
    return "sha256:" + digest.hexdigest()


def inside(root: Path, relative: str) -> Path:
    """``root / relative``, refused when it would lead out of ``root``.

    Raises:
        Usage: an absolute path, a drive, a ``..`` or a NUL.
    """
    path = Path(relative.replace("\\", "/"))
    parts = path.parts
    if not parts or path.is_absolute() or ".." in parts or "\0" in relative or ":" in parts[0]:
        raise Usage(f"'{relative}' leads out of {root}", hint="paths in stackctl's files stay inside their folder")
    return root.joinpath(*parts)


def typed_path(text: str) -> Path:
    """A path as somebody typed it, with ``~`` for a home where there is one."""
    try:
        return Path(text).expanduser()
    except RuntimeError:  # nobody of that name
        return Path(text)


def existing(path: Path, what: str) -> Path:
    """``path`` if something is there.

    Raises:
        NotFound: nothing is.
    """
    if not path.exists():
        raise missing(path, what)
    return path


def portable_path(path: Path, root: Path) -> str:
    """Relative to a registry's ``root`` when both lie in one project, so that the project can move; else absolute."""
    return os.path.relpath(path, root) if path.is_relative_to(root.parent) else str(path)


def missing(path: Path, what: str = "") -> NotFound:
    """The error that something typed is not there; its hint names what is called nearly so beside it."""
    near = None
    with contextlib.suppress(OSError), os.scandir(path.parent) as found:
        near = closest(path.name, [each.name for each in itertools.islice(found, _LOOKED_AT)])
    hint = "check the path; it may be relative to the working directory"
    return NotFound(
        f"{what} {path} does not exist".strip(), hint=f"did you mean '{path.with_name(near)}'?" if near else hint
    )


def check_place(path: Path, option: str) -> None:
    """Where a file is to go is known to be possible before anything is computed; ``option`` is what named it.

    Raises:
        NotFound, Usage, Failed: there is no such folder, it cannot be written to, or the file's name is a folder's.
    """
    folder = existing(path.absolute().parent, "the folder")
    if not folder.is_dir():
        raise Usage(f"{folder} is a file, not a folder", hint=f"name another place: {option} FILE")
    if path.is_dir():
        raise Usage(f"{option} {path} is a folder", hint="name a file")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise Failed(f"nothing can be written to {folder}", hint="check who owns the folder and its permissions")


_ROOM = 2**20
"""Free bytes under which a library that only says that it could not write has met a full disk."""


def disk_is_full(error: BaseException, folder: Path) -> bool:
    """Whether something could not be written into ``folder`` for want of space, also where a library hides why."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    with contextlib.suppress(OSError):
        return shutil.disk_usage(folder).free < _ROOM
    return False


def explain_oserror(error: OSError) -> Failed:
    """An operating-system error as one sentence and a way on."""
    name = str(error.filename or "")
    if len(name) > _LONGEST_NAME:
        name = f"{name[: _LONGEST_NAME // 2]}…{name[-_LONGEST_NAME // 2 :]}"
    where = f" ({name})" if name else ""
    hints = {
        errno.ENOSPC: "free some space and run the command again; nothing was registered",
        errno.EDQUOT: "free some of your quota and run the command again; nothing was registered",
        errno.EACCES: "check who owns the folder and its permissions",
        errno.EPERM: "check who owns the folder and its permissions",
        errno.EROFS: "the file system is read-only: choose another place with --registry or --out",
        errno.ENAMETOOLONG: "choose a shorter path",
    }
    reason = error.strerror or type(error).__name__
    return Failed(f"{reason[:1].lower()}{reason[1:]}{where}", hint=hints.get(error.errno or 0))


def human_bytes(size: float) -> str:
    """``12.3 MB``: decimal units, as disks and the Hub count."""
    for unit in ("B", "kB", "MB", "GB"):
        if round(size, 1) < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
