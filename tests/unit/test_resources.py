"""What the machine has: never more than the operating system or a container's limit says."""

import subprocess
import sys

import pytest

from stackctl.machine import resources as machine


def test_there_is_memory_and_a_processor():
    memory = machine.main_memory()
    assert 0 <= memory.available <= memory.total
    assert machine.cores() >= 1
    assert machine.system()


@pytest.mark.parametrize(
    ("limit", "used", "total"), [("1000000\n", "400000\n", 1_000_000), ("max\n", "400000\n", None), (None, None, None)]
)
def test_a_containers_limit_counts(tmp_path, monkeypatch, limit, used, total):
    monkeypatch.setattr(machine, "_CGROUP", ())
    alone = machine.main_memory()
    limit_file, used_file = tmp_path / "limit", tmp_path / "used"
    if limit is not None:
        limit_file.write_text(limit)
        used_file.write_text(used)
    monkeypatch.setattr(machine, "_CGROUP", ((limit_file, used_file),))
    memory = machine.main_memory()
    assert memory.total == (total or alone.total)
    if total:
        assert memory.available == 600_000


@pytest.mark.parametrize("version", [1, 2])
def test_the_limit_of_an_inner_group_counts_and_its_files_are_free(tmp_path, monkeypatch, version):
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if version == 1 else ("memory.max", "memory.current")
    monkeypatch.setattr(machine, "_CGROUP", ((tmp_path / names[0], tmp_path / names[1]),))
    inner = tmp_path / "system.slice" / "run.scope"
    inner.mkdir(parents=True)
    (inner / names[0]).write_text("1000000\n")
    (inner / names[1]).write_text("900000\n")
    (tmp_path / "system.slice" / names[0]).write_text("5000000\n")
    prefix = "total_" if version == 1 else ""
    (inner / "memory.stat").write_text(f"anon 5\n{prefix}inactive_file 200000\n{prefix}active_file 100000\n")
    own = tmp_path / "cgroup"
    own.write_text(
        "4:memory:/system.slice/run.scope\n0::/\n" if version == 1 else "4:memory:/x\n0::/system.slice/run.scope\n"
    )
    monkeypatch.setattr(machine, "_OWN_GROUPS", own)
    assert machine.main_memory() == machine.Memory(1_000_000, 400_000)


def test_what_this_process_holds_is_told():
    before = machine.own_memory()
    held = bytearray(b"x" * 64_000_000)
    assert machine.own_memory() - before > 48_000_000
    del held


@pytest.mark.parametrize(
    ("share", "cores"),
    [("150000 100000\n", 2), ("50000 100000", 1), ("max 100000\n", 8), ("900000 100000", 8), ("", 8)],
)
def test_a_containers_share_of_the_processors_counts(tmp_path, monkeypatch, share, cores):
    (tmp_path / "cpu.max").write_text(share)
    monkeypatch.setattr(machine, "_CPU_SHARE", tmp_path / "cpu.max")
    monkeypatch.setattr(machine, "allowed_cores", lambda: list(range(8)))
    assert machine.cores() == cores


def test_free_space_where_a_folder_would_be_made(tmp_path):
    assert machine.disk_free(tmp_path / "not" / "there" / "yet") > 0


def test_the_packages_that_are_needed_are_here():
    found, wrong = machine.packages()
    assert {"torch", "transformers", "peft", "typer"} <= set(found)
    assert "pytest" not in found  # of an extra
    assert wrong == []


def test_what_is_missing_or_too_old_is_said(monkeypatch):
    monkeypatch.setattr(machine, "installed", {"torch": None, "peft": "0.1"}.get)
    _, wrong = machine.packages()
    assert any(text.startswith("torch") and text.endswith("is missing") for text in wrong)
    assert any(text.startswith("peft") and "0.1 is installed" in text for text in wrong)


BLOCKS = """
import sys
from stackctl.machine.resources import map_blocks, own_memory
if sys.argv[1] == "mapped":
    map_blocks(4 * 2**20)
large = b"x" * (30 << 20)
del large  # glibc learns to keep as much in its heap
free, stays = [b"x" * (20 << 20)], b"y" * (20 << 20)
before = own_memory()
free.clear()
print(before - own_memory())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's heap")
def test_a_large_block_before_one_that_stays_is_given_back():
    kept, given = (
        int(subprocess.run([sys.executable, "-c", BLOCKS, how], capture_output=True, text=True, check=True).stdout)
        for how in ("as it is", "mapped")
    )
    assert kept < 1 << 20 < 19 << 20 < given
