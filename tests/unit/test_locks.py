"""Locks between processes: free when the holder is dead, and named when it is not."""

import platform
import subprocess
import sys

import pytest

from stackctl.core.errors import Failed, Usage
from stackctl.storage.locks import locked


def test_a_lock_held_elsewhere_is_an_error_with_a_way_on(tmp_path, monkeypatch):
    program = (
        "import sys, time, pathlib; from stackctl.storage.locks import locked\n"
        "with locked(pathlib.Path(sys.argv[1]), 'x'):\n  print('held', flush=True); sys.stdin.read()\n"
    )
    path = tmp_path / "deep" / ".lock"
    with subprocess.Popen(
        [sys.executable, "-c", program, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        monkeypatch.setenv("STACKCTL_LOCK_TIMEOUT", "0.1")
        with pytest.raises(Failed) as caught, locked(path, "the registry"):
            pass
        assert caught.value.exit_code == 1
        assert f"process {holder.pid} on {platform.node()} since 20" in caught.value.message
        assert caught.value.message.endswith(f"(-c {path}) ({path})")
        holder.kill()  # a killed holder leaves the lock free
    with locked(path, "the registry"):
        pass


def test_a_lock_is_given_back_after_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("STACKCTL_LOCK_TIMEOUT", "0.1")
    for _ in range(2):
        with pytest.raises(RuntimeError), locked(tmp_path / ".lock", "x"):
            raise RuntimeError


@pytest.mark.parametrize("seconds", ["soon", "nan", "inf", "-1"])
def test_a_senseless_lock_timeout_is_wrong_usage(tmp_path, monkeypatch, seconds):
    monkeypatch.setenv("STACKCTL_LOCK_TIMEOUT", seconds)
    with pytest.raises(Usage), locked(tmp_path / ".lock", "x"):
        pass


def test_a_lock_whose_holder_did_not_say_who_it_is(tmp_path, monkeypatch):
    monkeypatch.setenv("STACKCTL_LOCK_TIMEOUT", "0")
    with locked(tmp_path / ".lock", "x"):
        (tmp_path / ".lock").write_text("half a li")
        with pytest.raises(Failed) as caught, locked(tmp_path / ".lock", "the registry"):
            pass
    assert "locked by another stackctl process" in caught.value.message
