"""How every kind of error ends a command: its exit code, its two lines, and with --debug the traceback besides."""

import contextlib
import errno
import importlib
import importlib.machinery
import json
import marshal
import os
import py_compile
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from stackctl.cli.command import Context
from stackctl.core import errors
from stackctl.core.command_line import CommandLine, typed
from stackctl.core.errors import StackctlError
from stackctl.render.output import Output
from stackctl.storage import atomic


def _kinds(kind: type[StackctlError]) -> list[type[StackctlError]]:
    return [kind, *(below for inner in kind.__subclasses__() for below in _kinds(inner))]


OTHERS = [(OSError(errno.ENOSPC, "disk"), 1), (FileNotFoundError(2, "gone"), 1), (ValueError("odd"), 1)]
OTHERS += [(KeyError("k"), 1), (RecursionError(), 1), (KeyboardInterrupt(), 130)]
CASES = [(kind("it went wrong", hint="do this"), kind.exit_code) for kind in _kinds(StackctlError)] + OTHERS


@pytest.mark.parametrize(("error", "code"), CASES, ids=lambda value: type(value).__name__)
def test_debug_adds_the_traceback_and_changes_nothing_else(run, monkeypatch, error, code):
    def fail(_: Context) -> None:
        raise error

    monkeypatch.setattr(Context, "registry", property(fail))
    told = run("use", "style", "--json", code=code)
    debugged = run("use", "style", "--json", "--debug", code=code)
    assert "Traceback" not in told.err
    assert debugged.err.startswith("Traceback")
    assert debugged.err.endswith(told.err)
    assert told.err.count("\n") == 2
    assert debugged.json == told.json
    assert set(told.json["error"]) == {"code", "message", "hint"}


def test_a_full_disk_is_one_also_in_the_words_of_a_library(run, monkeypatch):
    """safetensors raises no OSError, and was told as a bug."""

    def fail(_: Context) -> None:
        raise RuntimeError(f"Error while serializing: I/O error: {os.strerror(errno.ENOSPC)} (os error {errno.ENOSPC})")

    monkeypatch.setattr(Context, "registry", property(fail))
    told = run("use", "style", "--json", code=1).json["error"]
    assert told["message"] == os.strerror(errno.ENOSPC).replace("No", "no", 1)
    assert "free some space" in told["hint"]


def _cut_compiled(package: Path) -> str:
    compiled = Path(py_compile.compile(str(package / "part.py"), doraise=True) or "")
    compiled.write_bytes(compiled.read_bytes()[:40])
    return str(compiled)


def _cut_source(package: Path) -> str:
    (package / "part.py").write_text("def f(:")
    return str(package / "part.py")


def _lost(package: Path) -> str:
    (package / "part.py").unlink()
    return "frail.part cannot be imported (No module named 'frail.part')"


def _cut_library(package: Path) -> str:
    (package / "part.py").unlink()
    (package / f"part{importlib.machinery.EXTENSION_SUFFIXES[-1]}").write_bytes(b"\x7fELF")
    return "frail.part cannot be imported"


def _older(package: Path) -> str:
    (package / "part.py").write_text("from frail import newer")
    return "frail cannot be imported (cannot import name 'newer' from 'frail'"


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize(
    ("damage", "way_out"),
    [(_cut_compiled, "rm /"), *((how, "pip install frail") for how in (_cut_source, _lost, _cut_library, _older))],
)
def test_a_package_that_cannot_be_imported_is_named_with_the_way_out(
    run, monkeypatch, tmp_path, damage, way_out, wrapped
):
    """Cut off by a full disk, removed in part, of another version; also as transformers passes it on."""
    package = tmp_path / "frail"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "part.py").write_text("x = [1, 2, 3]\n" * 9)
    told = damage(package)
    monkeypatch.syspath_prepend(tmp_path)

    def fail(_: Context) -> None:
        try:
            importlib.import_module("frail.part")
        except Exception as error:
            if wrapped:
                raise RuntimeError("Failed to import something lazily") from error
            raise

    monkeypatch.setattr(Context, "registry", property(fail))
    error = run("use", "style", "--json", code=1).json["error"]
    sys.modules.pop("frail", None)
    assert told in error["message"]
    assert way_out in error["hint"] and "bug" not in error["hint"]


def test_the_command_that_installs_a_package_again_names_its_distribution(run, monkeypatch):
    def fail(_: Context) -> None:
        importlib.import_module("yaml.gone")

    monkeypatch.setattr(Context, "registry", property(fail))
    hint = run("use", "style", "--json", code=1).json["error"]["hint"]
    assert hint == "install it again: pip install --force-reinstall --no-deps PyYAML"


@pytest.mark.parametrize(("name", "value"), [("HF_ENDPOINT", "http://[::1"), ("HF_HUB_DOWNLOAD_TIMEOUT", "soon")])
def test_settings_that_huggingface_hub_cannot_read_are_no_bug(tmp_path, name, value):
    line = [sys.executable, "-m", "stackctl", "doctor", "--json"]
    environment = {**os.environ, name: value}
    ran = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    told = json.loads(ran.stdout)["error"]
    assert ran.returncode == 1 and "cannot be imported with these settings" in told["message"]
    assert "begins with HF_" in told["hint"]


def test_an_odd_value_while_nothing_is_imported_is_still_a_bug(run, monkeypatch):
    def fail(_: Context) -> None:
        marshal.loads(b"")

    monkeypatch.setattr(Context, "registry", property(fail))
    assert "this is a bug" in run("use", "style", code=1).err


def test_weights_that_go_while_a_command_reads_them_are_no_riddle(run, monkeypatch):
    """Another process removed them and freed their space; the hint was --debug."""

    def fail(_: Context) -> None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "weights/style/1/adapter_model.safetensors")

    monkeypatch.setattr(Context, "registry", property(fail))
    told = run("use", "style", "--json", code=1).json["error"]
    assert told["message"] == "no such file or directory (weights/style/1/adapter_model.safetensors)"
    assert "removed meanwhile" in told["hint"]


class OutOfMemoryError(RuntimeError):
    """What torch's is called, which no light command imports."""


@pytest.mark.parametrize(
    ("error", "which", "hint"),
    [
        (
            OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has …"),
            "the device's",
            "--device cpu",
        ),
        (RuntimeError("… DefaultCPUAllocator: can't allocate memory: you tried to …"), "main", "again"),
        (MemoryError(), "main", "again"),
    ],
)
def test_a_full_memory_is_no_bug(run, monkeypatch, error, which, hint):
    def full(_):
        raise error

    monkeypatch.setattr(Context, "registry", property(full))
    told = run("ls", "--json", code=1).json["error"]
    assert told["message"] == f"{which} memory is full"
    assert hint in told["hint"]


def test_every_documented_exit_code_is_one_of_a_kind():
    assert {kind.exit_code for kind in _kinds(StackctlError)} == {1, 2, 3, 4, 5, 6, 130, 143}
    assert {kind.code for kind in _kinds(StackctlError)} >= {"usage", "not_found", "incompatible", "hub"}
    assert errors.HubFailure.exit_code == 6


@pytest.mark.parametrize(
    "words",
    [
        ("ls", "--jsn"), ("nosuch",), ("--nope",), ("base", "nosuch"), ("base", "--nope"), ("train", "--alpha"),
        ("rm",), ("ls", "--tree=yes"), ("base", "add", "--prove=1"), ("rm", "--json=1"),
    ],
)  # fmt: skip
def test_a_command_line_that_cannot_be_read_is_told_as_it_asks(run, words):
    end = 1 if words[-1] == "--alpha" else len(words)
    told = run(*words[:end], "--json", *words[end:], code=2)
    assert told.json["error"]["code"] == "usage"
    assert "Traceback" not in told.err
    assert "Traceback" in run(*words[:end], "--debug", *words[end:], code=2).err


@pytest.mark.parametrize("words", [("push", "-m", "--json"), ("push", "-m", "--debug"), ("compose", "--", "--json")])
def test_a_value_that_looks_like_an_option_is_none(run, words):
    told = run(*words, code=3)
    assert told.out == ""
    assert "Traceback" not in told.err


@pytest.mark.parametrize("option", ["--learning-rate", "--rank", "--data", "--base", "--registry", "--report-to"])
@pytest.mark.parametrize("swallowed", ["--json", "--epochs"])
def test_an_option_in_the_place_of_a_value_is_told_as_that(run, option, swallowed):
    """A number, a word, a path, a name; with ``--json`` as JSON, although it stood there."""
    told = run("train", "style", option, swallowed, *(["--json"] if swallowed != "--json" else []), code=2).json
    assert told["error"]["message"] == f"{option} needs a value, and {swallowed} is the next option"
    assert told["error"]["hint"] == "stackctl train --help"


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (("base", "add", "--prove=1"), "stackctl base add --help"),
        (("base", "ls", "--json=1"), "stackctl base ls --help"),
        (("ls", "--tree=1"), "stackctl ls --help"),
        (("--json", "ls"), "options come after the command: stackctl COMMAND --json"),
    ],
)
def test_the_hint_of_wrong_usage_is_of_the_command_that_was_typed(run, words, hint):
    assert f"hint: {hint}" in run(*words, code=2).err


# -- paths ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (("init", ""), "DIR"),
        (("ls", "--registry", ""), "--registry"),
        (("export", "--out", ""), "--out"),
        (("verify", "--repair", "--from", ""), "--from"),
        (("add", "style", ""), "PATH"),
        (("base", "add", "tiny", ""), "the source"),
        (("train", "--config="), "--config"),
    ],
)
def test_an_empty_path_is_not_the_working_directory(run, tmp_path, words, what):
    before = sorted(tmp_path.iterdir())
    assert f"error: {what} is empty" in run(*words, code=2).err
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "words",
    [
        ("serve", "--api-key", ""), ("serve", "--host="), ("train", "style", "--data", "x.jsonl", "--on", ""),
        ("train", "style", "--data", ""), ("add", "style", ".", "--base="), ("add", "style", ".", "--on="),
        ("push", "style", "me/style", "--tag="), ("eval", "base", "--data="), ("extract", "style", "--tuned="),
    ],
)  # fmt: skip
def test_an_empty_word_is_not_the_option_left_out(run, words):
    """With ``--api-key "$KEY"`` and no such variable, the server would be open to everybody."""
    option = next(word for word in words if word.startswith("--")) if "--on" not in words else "--on"
    assert f"error: {option.rstrip('=')} is empty" in run(*words, code=2).err


def test_a_description_may_be_empty(run):
    assert "is empty" not in run("add", "style", "nowhere", "--description", "", code=3).err


def test_a_tilde_that_the_shell_left_is_the_home(run, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert run("init", "--registry=~/kept", "--json").json["registry"] == str(tmp_path / "home" / "kept")
    assert run("ls", "--registry=~/kept", "--json").json["registry"] == str(tmp_path / "home" / "kept")
    monkeypatch.setenv("STACKCTL_REGISTRY", "~/kept")
    assert run("ls", "--json").json["registry"] == str(tmp_path / "home" / "kept")
    assert not (tmp_path / "~").exists()


def test_the_command_of_a_hint_is_quoted(run):
    assert "hint: stackctl init 'a b'" in run("ls", "--registry", "a b", code=3).err


def test_only_the_hub_has_revisions(run, tmp_path):
    run("init")
    assert "--revision" in run("base", "add", "tiny", tmp_path, "--revision", "v1", code=2).err


# -- texts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (("generate", "base", "-p", "caf\udce9"), "-p"),
        (("generate", "base", "-p", "sea", "--system", "caf\udce9"), "--system"),
        (("compare", "base", "base", "-p", "sea", "--stop", "\udce9"), "--stop"),
        (("bisect", "style", "-p", "sea", "--bad", "\udce9"), "--bad"),
        (("add", "style", ".", "--description", "\udce9"), "--description"),
        (("train", "style", "--data", "x.jsonl", "--train-tokens", "\udce9"), "--train-tokens"),
        (("compose", "style", "--rank", "\udce9"), "--rank"),
    ],
)
def test_a_text_that_is_not_utf8_is_refused_by_its_option(run, words, option):
    """It was a bug to the tokenizer, and in an entry it became another text."""
    told = run(*words, code=2).err
    assert "not UTF-8" in told and option in told.splitlines()[0]


# -- the streams that it is given -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "streams", "code"),
    [
        ("ls --json", "<&- >&-", 0),
        ("ls", "2>&-", 0),
        ("ls --json", "<&- >&- 2>&-", 0),
        ("use nope --json", ">&-", 3),
        ("use nope --json", "2>&-", 3),
        ("use nope", "2>/dev/full", 3),
        ("use nope --json", ">/dev/full", 3),
        ("generate", "<&-", 2),
        ("ls --json", ">/dev/full", 1),
        ("ls", ">/dev/full", 1),
    ],
)
def test_streams_that_are_closed_or_full_are_no_bug(run, tmp_path, words, streams, code):
    """Each was an AttributeError told as a bug, a traceback, or Python's own exit code 120."""
    run("init")
    shell = f'exec "{sys.executable}" -m stackctl {words} {streams}'
    done = subprocess.run(["sh", "-c", shell], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr and "bug" not in done.stderr
    if code == 1:
        assert "error: the command is done, but its result cannot be written: no space left on device" in done.stderr
    if words == "use nope --json" and streams == "2>&-":
        assert json.loads(done.stdout)["error"]["code"] == "not_found"


# -- the command to type again ----------------------------------------------------------------------------------------


def test_what_was_typed_is_repeated_quoted(monkeypatch):
    words = ["stackctl", "push", "style", "me/style", "-m", "it's new", "--license", "mit", "--language", "en"]
    monkeypatch.setattr("sys.argv", words)
    assert str(typed()) == "stackctl push style me/style -m 'it'\"'\"'s new' --license mit --language en"


def test_the_commands_of_a_hint_name_the_registry_that_was_typed(run, tmp_path):
    folder = tmp_path / "a b"
    run("init", "--registry", folder)
    told = f"--registry '{folder}'"
    assert f"stackctl ls {told} shows" in run("inspect", "nosuch", "--registry", folder, code=3).err
    assert f"stackctl base add {told} nosuch SOURCE" in run("base", "rm", "nosuch", "--registry", folder, code=3).err
    away = run("ls", "--registry", tmp_path / "away", code=3).err
    assert "--registry" not in away.partition("hint:")[2]
    assert run("ls", "--nope", "--registry", folder, code=2).err.endswith("hint: stackctl ls --help\n")


@pytest.mark.parametrize(
    ("typed", "then"),
    [
        ("pull me/a", "pull me/a --name NAME"),
        ("pull me/a --name x --dry-run", "pull me/a --name NAME --dry-run"),
        ("pull --name=x me/a", "pull --name NAME me/a"),
        ("pull --base b -- me/a", "pull --base b --name NAME -- me/a"),
    ],
)
def test_an_option_takes_the_place_of_the_one_that_was_given(typed, then):
    line = CommandLine(tuple(typed.split()))
    assert str(line.having("--name", "NAME")) == then
    assert line.having("--name", "NAME").having("--name", "NAME") == line.having("--name", "NAME")
    assert "--name" not in line.having("--name", "NAME").without("--name", value=True).words


def test_a_switch_is_given_once():
    line = CommandLine(("verify", "--repair", "x"))
    assert line.having("--repair") == line
    assert str(line.without("--repair")) == "verify x"


_INTERRUPTED_AT_AN_IMPORT = """
import runpy, sys
class Finder:
    def find_spec(self, name, *_):
        if name == "typer":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Finder())
sys.argv = ["stackctl", "ls", *sys.argv[1:]]
runpy.run_module("stackctl", run_name="__main__")
"""


@pytest.mark.parametrize("words", [["--json"], []])
def test_what_is_interrupted_before_it_has_begun_ends_like_any_other(words):
    """It ended in a traceback out of the imports."""
    ran = subprocess.run([sys.executable, "-c", _INTERRUPTED_AT_AN_IMPORT, *words], capture_output=True, text=True)
    assert ran.returncode == 130
    assert ran.stderr == "error: interrupted\nhint: run the command again to go on\n"
    assert [json.loads(line)["error"]["code"] for line in ran.stdout.splitlines()] == ["interrupted"] * len(words)


def test_what_is_interrupted_before_its_command_line_is_read_answers_in_json(run, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("stackctl.cli.built_app", interrupt)
    assert run("ls", "--json", code=130).json["error"]["code"] == "interrupted"
    assert run("ls", code=130).out == ""


@pytest.mark.parametrize(("number", "code", "told"), [(2, 130, "interrupted"), (15, 143, "terminated")])
def test_a_signal_ends_a_command_with_its_code_and_nothing_of_it_stays(run, monkeypatch, tmp_path, number, code, told):
    """SIGTERM ended it where it stood, and left what it was making until another swept it."""

    def work(_):
        with atomic.staging_directory(tmp_path / "weights"), contextlib.suppress(Exception):
            os.kill(os.getpid(), number)
            time.sleep(10)

    before = signal.getsignal(number)
    monkeypatch.setattr(Context, "registry", property(work))
    ran = run("ls", "--json", code=code)
    assert ran.json["error"] == {"code": "interrupted", "message": told, "hint": "run the command again to go on"}
    assert not [*(tmp_path / "weights").iterdir()]
    assert signal.getsignal(number) == before


def test_who_presses_ctrl_c_twice_reads_how_it_ended(run, monkeypatch):
    """The second one came while that was written: a traceback."""

    def interrupted(_):
        raise KeyboardInterrupt

    error = Output.error

    def told(self, what):
        os.kill(os.getpid(), signal.SIGINT)
        error(self, what)

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(Context, "registry", property(interrupted))
    monkeypatch.setattr(Output, "error", told)
    assert run("ls", code=130).err == "error: interrupted\nhint: run the command again to go on\n"
    assert signal.getsignal(signal.SIGINT) == before


def test_ctrl_c_while_torch_is_imported_waits_for_its_end(run, monkeypatch):
    """An exception that comes back to its own code aborts the process: exit code -6."""
    torch = types.ModuleType("torch")
    torch.__spec__ = importlib.machinery.ModuleSpec("torch", None)
    imported = []

    def work(_):
        torch.__spec__._initializing = True
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)
        imported.append(torch)
        torch.__spec__._initializing = False
        time.sleep(10)

    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setattr(Context, "registry", property(work))
    run("ls", code=130)
    assert imported


def test_a_signal_that_whoever_starts_it_has_it_ignore_stays_ignored(run, monkeypatch):
    """nohup, and the background jobs of a shell."""

    def work(_):
        os.kill(os.getpid(), signal.SIGTERM)
        raise errors.NotFound("it went on", hint="as it should")

    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    monkeypatch.setattr(Context, "registry", property(work))
    assert "it went on" in run("ls", code=3).err
    assert signal.signal(signal.SIGTERM, before) == signal.SIG_IGN


_INTERRUPTED_IN_A_LIBRARY = """
import ctypes
from stackctl.__main__ import main
from stackctl.cli.command import Context

run = ctypes.pythonapi.PyRun_String
run.restype = ctypes.py_object
run.argtypes = (ctypes.c_char_p, ctypes.c_int, ctypes.py_object, ctypes.py_object)
interrupt = (b"raise KeyboardInterrupt", 257, {"__builtins__": __builtins__}, {})
Context.registry = property(lambda _: run(*interrupt))
main()
"""


def test_ctrl_c_in_code_that_a_library_runs_is_130_as_well(tmp_path):
    """``python -m`` killed itself by SIGINT after all was told."""
    (tmp_path / "interrupted.py").write_text(_INTERRUPTED_IN_A_LIBRARY)
    line = [sys.executable, "-m", "interrupted", "ls"]
    ran = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stderr) == (130, "error: interrupted\nhint: run the command again to go on\n")
