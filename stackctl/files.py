"""Files that are never half there: atomic writes, staging folders, digests, locks, safe paths."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from stackctl.errors import Failed, NotFound, Usage

STAGING_PREFIX = ".tmp-"
"""Whatever carries this prefix is unfinished work of some process and may be swept once that process is gone."""

_CHUNK = 1 << 20
_STALE_AFTER_SECONDS = 24 * 3600
_LOCK_TIMEOUT = "STACKCTL_LOCK_TIMEOUT"


def fsync_directory(path: Path) -> None:
    """Make a rename inside ``path`` survive a power cut (a no-op where folders cannot be opened)."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a whole file or nothing: a temporary sibling, flushed, then renamed over ``path``."""
    data = content.encode() if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=STAGING_PREFIX, dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        Path(name).chmod(0o666 & ~_umask())
        Path(name).replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(name).unlink()
        raise
    fsync_directory(path.parent)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


@contextlib.contextmanager
def staging_directory(parent: Path) -> Iterator[Path]:
    """A private folder beside the place where its content will end; gone afterwards unless it was renamed away."""
    parent.mkdir(parents=True, exist_ok=True)
    path = Path(tempfile.mkdtemp(prefix=STAGING_PREFIX, dir=parent))
    path.chmod(0o777 & ~_umask())
    try:
        yield path
    finally:
        if path.exists():
            shutil.rmtree(path, ignore_errors=True)


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
    final.parent.mkdir(parents=True, exist_ok=True)
    if final.is_dir() and not any(final.iterdir()):
        final.rmdir()
    if final.exists() or final.is_symlink():
        raise Usage(f"{final} already exists", hint="choose another folder, or remove it first")
    staged.rename(final)
    fsync_directory(final.parent)


def sweep_staging(parent: Path) -> list[Path]:
    """Remove what killed processes left in ``parent``: staging files and folders older than a day."""
    swept = []
    if parent.is_dir():
        for path in parent.glob(f"{STAGING_PREFIX}*"):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > _STALE_AFTER_SECONDS:
                    remove_tree(path)
                    swept.append(path)
    return swept


def remove_tree(path: Path) -> None:
    """Remove a file, a link or a folder; a link's target is never followed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sha256_bytes(data: bytes) -> str:
    """``sha256:<hex>`` of some bytes."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """``sha256:<hex>`` of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(_CHUNK):
            digest.update(piece)
    return "sha256:" + digest.hexdigest()


@contextlib.contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Hold the one lock at ``path`` while the body runs.

    Raises:
        Failed: another process held it for the whole time-out.
    """
    import filelock

    path.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(path, timeout=_lock_timeout())
    try:
        lock.acquire()
    except filelock.Timeout:
        raise Failed(
            f"{what} is locked by another stackctl process ({path})",
            hint=f"wait for it to finish and try again ({_LOCK_TIMEOUT} sets the seconds to wait)",
        ) from None
    try:
        yield
    finally:
        lock.release()


def _lock_timeout() -> float:
    text = os.environ.get(_LOCK_TIMEOUT) or "60"
    try:
        return float(text)
    except ValueError:
        raise Usage(f"{_LOCK_TIMEOUT} is '{text}', which is no number of seconds", hint="unset it") from None


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


def existing(path: Path, what: str) -> Path:
    """``path`` if something is there.

    Raises:
        NotFound: nothing is.
    """
    if not path.exists():
        raise NotFound(
            f"{what} {path} does not exist", hint="check the path; it may be relative to the working directory"
        )
    return path


def explain_oserror(error: OSError) -> Failed:
    """An operating-system error as one sentence and a way on."""
    where = f" ({error.filename})" if error.filename else ""
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
