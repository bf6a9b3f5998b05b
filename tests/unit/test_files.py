"""Files that are never half there, and paths that never lead out."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from checkpoints import make_base, make_registry, write_checkpoint

from stackctl.core.errors import NotFound, Usage, explain_oserror
from stackctl.storage import atomic, files
from stackctl.storage.hashes import sha256_bytes, sha256_file
from stackctl.storage.paths import check_output, existing_path


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_written_whole(tmp_path):
    path = tmp_path / "new folder" / "ü.yaml"
    atomic.write_atomic(path, "é\r\n")
    assert path.read_bytes() == "é\r\n".encode()
    atomic.write_atomic(path, b"\0\1")
    assert path.read_bytes() == b"\0\1"
    assert names_in(path.parent) == ["ü.yaml"]


@pytest.mark.parametrize("interruption", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, interruption, step):
    path = tmp_path / "f"
    atomic.write_atomic(path, "old")

    def interrupt(*_):
        raise interruption

    monkeypatch.setattr(os, step, interrupt)
    if step == "replace":
        monkeypatch.setattr("pathlib.Path.replace", interrupt)
    with pytest.raises(type(interruption)):
        atomic.write_atomic(path, "new")
    assert path.read_text() == "old"
    assert names_in(tmp_path) == ["f"]


def test_files_obey_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        atomic.write_atomic(tmp_path / "f", "x")
        with atomic.staging_directory(tmp_path) as staged:
            assert staged.stat().st_mode & 0o777 == 0o750
    finally:
        os.umask(before)
    assert (tmp_path / "f").stat().st_mode & 0o777 == 0o640


def test_text_that_cannot_be_encoded_leaves_nothing_behind(tmp_path):
    with pytest.raises(UnicodeEncodeError):
        atomic.write_atomic(tmp_path / "f", "\ud800")
    assert not names_in(tmp_path)


def test_a_staged_folder_gets_its_name_in_one_step_or_vanishes(tmp_path):
    with atomic.staging_directory(tmp_path) as staged:
        (staged / "sub").mkdir()
        (staged / "sub" / "f").write_text("x")
        atomic.publish_directory(staged, tmp_path / "a" / "final")
    assert (tmp_path / "a" / "final" / "sub" / "f").read_text() == "x"
    with pytest.raises(RuntimeError), atomic.staging_directory(tmp_path) as staged:
        (staged / "f").write_text("x")
        raise RuntimeError
    assert names_in(tmp_path) == ["a"]


def test_publishing_replaces_nothing(tmp_path):
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "mine").write_text("x")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for final in ("final", "dangling"):
        with atomic.staging_directory(tmp_path) as staged, pytest.raises(Usage):
            atomic.publish_directory(staged, tmp_path / final)
    assert (tmp_path / "final" / "mine").read_text() == "x"


def test_publishing_into_an_empty_folder(tmp_path):
    (tmp_path / "final").mkdir()
    with atomic.staging_directory(tmp_path) as staged:
        (staged / "f").write_text("x")
        atomic.publish_directory(staged, tmp_path / "final")
    assert (tmp_path / "final" / "f").is_file()


LEAVE_BEHIND = """
import os, pathlib, signal, sys
from stackctl.storage import atomic
folder = pathlib.Path(sys.argv[1])
os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
pathlib.Path.replace = os.replace
with atomic.staging_directory(folder) as staged:
    (staged / "half").write_text("x")
    if sys.argv[2] == "alive":
        print(staged.name, flush=True)
        sys.stdin.read()
    atomic.write_atomic(folder / "entry.yaml", "x")
"""


def leave_behind(folder, how):
    return subprocess.Popen(
        [sys.executable, "-c", LEAVE_BEHIND, str(folder), how], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def test_what_a_killed_process_left_is_swept_at_once_and_nothing_else(tmp_path):
    with leave_behind(tmp_path, "dead") as dead:
        assert dead.wait(60) == -signal.SIGKILL
    left = sorted(tmp_path.iterdir())
    assert [path.is_dir() for path in left] in ([True, False], [False, True])
    (tmp_path / "style").mkdir()
    with leave_behind(tmp_path, "alive") as alive:
        working = alive.stdout.readline().strip()
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["style", working])
        with atomic.staging_directory(tmp_path) as mine:
            assert atomic.sweep_staging(tmp_path) == []
            assert mine.is_dir()
        alive.kill()
    assert [path.name for path in atomic.sweep_staging(tmp_path)] == [working]
    assert names_in(tmp_path) == ["style"]
    assert atomic.sweep_staging(tmp_path / "nowhere") == []


def test_what_another_machine_left_is_swept_after_a_day(tmp_path, monkeypatch):
    monkeypatch.setattr("platform.node", lambda: "another")
    old, new, pipe = (tmp_path / (atomic._own_prefix() + name) for name in ("old", "new", "pipe"))
    monkeypatch.undo()
    old.mkdir()
    new.mkdir()
    os.mkfifo(pipe)
    past = time.time() - 2 * 24 * 3600
    os.utime(old, (past, past))
    assert atomic.sweep_staging(tmp_path) == [old]
    assert sorted(tmp_path.iterdir()) == [new, pipe]


def test_without_locks_only_age_tells(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EBADF, "no locks here")

    monkeypatch.setattr("fcntl.flock", refuse)
    with atomic.staging_directory(tmp_path) as staged:
        assert atomic.sweep_staging(tmp_path) == []
        assert staged.is_dir()
    atomic.write_atomic(tmp_path / "f", "x")
    assert names_in(tmp_path) == ["f"]


def test_what_is_swept_while_it_is_made_is_made_again(tmp_path, monkeypatch):
    """A sweeper may come between making a folder and locking it."""
    flock, swept = fcntl.flock, []

    def sweep_first(descriptor, operation):
        if operation == fcntl.LOCK_SH and len(swept) < 3:
            with monkeypatch.context() as patch:
                patch.setattr("fcntl.flock", flock)
                swept.extend(atomic.sweep_staging(tmp_path))
        flock(descriptor, operation)

    monkeypatch.setattr("fcntl.flock", sweep_first)
    with atomic.staging_directory(tmp_path) as staged:
        assert staged.is_dir()
    atomic.write_atomic(tmp_path / "f", "x")
    assert (tmp_path / "f").read_text() == "x"
    assert len(swept) == 3


def test_removing_never_follows_a_link(tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    (target / "f").write_text("x")
    (tmp_path / "link").symlink_to(target)
    files.remove_tree(tmp_path / "link")
    assert (target / "f").is_file()
    files.remove_tree(target / "f")
    files.remove_tree(tmp_path / "nothing")
    files.remove_tree(target)
    assert not list(tmp_path.iterdir())


def test_digests(tmp_path):
    (tmp_path / "f").write_bytes(b"abc" * 1_000_000)
    assert sha256_file(tmp_path / "f") == sha256_bytes(b"abc" * 1_000_000)
    assert sha256_bytes(b"") == "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def test_errors_of_the_system_become_one_sentence():
    error = explain_oserror(OSError(errno.ENOSPC, "No space left on device", "/x"))
    assert error.exit_code == 1
    assert "/x" in error.message
    assert error.hint
    assert explain_oserror(OSError("odd")).message
    too_large = explain_oserror(OSError(errno.EFBIG, "File too large"))
    assert too_large.hint is not None and "ulimit -f" in too_large.hint
    nowhere = explain_oserror(FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']"))
    assert nowhere.hint is not None and "TMPDIR" in nowhere.hint


@pytest.mark.parametrize(("name", "hint"), [("*.jsonl", "a pattern is no path"), ("-", "standard input")])
def test_what_a_shell_would_have_made_of_a_path_is_said(tmp_path, name, hint):
    (tmp_path / "a.jsonl").touch()
    with pytest.raises(NotFound) as caught:
        existing_path(tmp_path / name, "the file")
    assert hint in str(caught.value.hint)


def test_existing(tmp_path):
    assert existing_path(tmp_path, "the folder") == tmp_path
    with pytest.raises(NotFound):
        existing_path(tmp_path / "x", "the folder")


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (999_999, "1.0 MB"), (98_000_000, "98.0 MB"), (1.5e12, "1.5 TB")],
)
def test_sizes_for_people(size, text):
    assert files.human_bytes(size) == text


def test_a_file_without_an_end_is_not_read_for_ever(run, tmp_path):
    with pytest.raises(Usage, match="larger than 32 MiB"):
        files.read_bounded(Path("/dev/zero"))
    make_registry(tmp_path / "registry", make_base())
    for arguments in (("train", "style", "--config", "/dev/zero"), ("train", "style", "--data", "/dev/zero")):
        ran = run(*arguments, code=2)
        assert ran.err.splitlines()[-1].startswith("hint: ")
    endless = write_checkpoint(tmp_path / "endless")
    (endless / "adapter_config.json").unlink()
    (endless / "adapter_config.json").symlink_to("/dev/zero")
    run("add", "endless", endless, code=4)


@pytest.mark.parametrize("size", [0, 1, files._FIRST - 1, files._FIRST, files._FIRST + 1, 3 * files._FIRST])
def test_a_file_of_any_size_is_read_whole(tmp_path, size):
    data = bytes(n % 251 for n in range(size))
    (tmp_path / "file").write_bytes(data)
    assert files.read_bounded(tmp_path / "file") == data


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(errno.ENOSPC, "no"), True),
        (OSError(errno.EDQUOT, "no"), True),
        (FileNotFoundError(errno.ENOENT, "no"), False),
        (RuntimeError(f"I/O error: {os.strerror(errno.EDQUOT)} (os error 122)"), True),
        (RuntimeError("unexpected pos 64 vs 0"), False),
    ],
)
def test_only_a_disk_without_room_is_full(tmp_path, error, full):
    assert files.disk_is_full(error, tmp_path) is full


# -- what somebody named to write to ----------------------------------------------------------------------------------


def test_a_pipe_or_a_device_that_is_written_to_stays_one(tmp_path):
    """A file was put in its place: as root, ``--output /dev/null`` took the device from the whole machine."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    (tmp_path / "link").symlink_to("pipe")
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    for path, content in ((pipe, "é"), (tmp_path / "link", b"two")):
        check_output(path)
        atomic.write_output(path, content)
        assert os.read(reader, 10) == (content.encode() if isinstance(content, str) else content)
    os.close(reader)
    assert pipe.is_fifo() and names_in(tmp_path) == ["link", "pipe"]


def test_what_is_written_through_a_link_is_in_the_file_behind_it(tmp_path):
    (tmp_path / "results").mkdir()
    link = tmp_path / "link"
    link.symlink_to("results/new.txt")
    for content in ("first", "second"):
        check_output(link)
        atomic.write_output(link, content)
        assert (tmp_path / "results" / "new.txt").read_text() == content
    assert link.is_symlink() and names_in(tmp_path / "results") == ["new.txt"]
    (tmp_path / "dead").symlink_to("nowhere/new.txt")
    with pytest.raises(NotFound, match="nowhere"):
        check_output(tmp_path / "dead")
