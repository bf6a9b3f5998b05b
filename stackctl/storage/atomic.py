"""Files and folders that are never half there: atomic writes, staging folders, and the sweeping of what a kill left.

Unfinished work carries a name that no reader looks at, and a lock of the kernel that goes with the process, however it
ends. So what a killed process left is told from what another is writing now, and swept at once.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import platform
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from stackctl.core.errors import Usage
from stackctl.storage.files import children, remove_tree

STAGING_PREFIX = ".tmp-"
"""Whatever carries this prefix is unfinished work of some process and may be swept once that process is gone."""
_STALE_AFTER_SECONDS = 24 * 3600


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
    with written_after(path, content):
        pass


def write_output(path: Path, content: str | bytes) -> None:
    """Write a file that somebody named, whole or not at all and through a link; a device or a pipe stays what it is."""
    if path.exists() and not path.is_file():
        with path.open("wb") as stream:
            stream.write(content.encode() if isinstance(content, str) else content)
    else:
        write_atomic(Path(os.path.realpath(path)), content)


@contextlib.contextmanager
def written_after(path: Path, content: str | bytes) -> Iterator[None]:
    """:func:`write_atomic` around a change that belongs to it: on the disk before the body, in place after it.

    So a full disk is told before the body changes anything, and where the body fails ``path`` stays as it was.
    """
    data = content.encode() if isinstance(content, str) else content
    make_directory(path.parent)
    temporary, descriptor = _claim(lambda: tempfile.mkstemp(prefix=_own_prefix(), dir=path.parent)[::-1])
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
            temporary.chmod(0o666 & ~_umask())
            yield
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
def staging_directory(parent: Path, mode: int = 0o777) -> Iterator[Path]:
    """A private folder beside the place where its content will end; gone afterwards unless it was renamed away.

    What killed processes left in ``parent`` is swept first.
    """
    make_directory(parent)
    sweep_staging(parent)
    path, descriptor = _claim(lambda: _make_staging(parent))
    try:
        path.chmod(mode & ~_umask())
        yield path
    finally:
        if path.exists():
            shutil.rmtree(path, ignore_errors=True)
        os.close(descriptor)


def scratch_directory() -> contextlib.AbstractContextManager[Path]:
    """A folder of this user alone in the system's temporary folder, where what killed processes left is swept, too."""
    return staging_directory(Path(tempfile.gettempdir()), mode=0o700)


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


def discard_folder(path: Path) -> None:
    """Remove a folder that others may look for, so that none of them ever finds half of it.

    Raises:
        FileNotFoundError: somebody else was quicker.
    """
    hidden = path.with_name(f"{_own_prefix()}{os.getpid()}-{path.name}")
    path.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)  # what cannot be removed, or what a kill leaves, is swept later
