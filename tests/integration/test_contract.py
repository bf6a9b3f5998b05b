"""What every command promises: help, streams, exit codes, the registry in use, names."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import register, write_checkpoint

COMMANDS = [
    (), ("init",), ("base",), ("base", "add"), ("base", "ls"), ("base", "rm"), ("add",), ("ls",), ("rm",), ("use",),
    ("gc",), ("train",), ("compose",), ("inspect",), ("generate",), ("compare",), ("eval",), ("export",), ("push",),
    ("push-to-hub",), ("pull",), ("verify",), ("demo",),
]  # fmt: skip


# -- help -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [(), ("base",)], ids=["stackctl", "base"])
def test_a_group_alone_shows_its_help(run, group):
    assert run(*group).out == run(*group, "--help").out


def test_every_common_option_is_in_every_commands_help(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    for command in COMMANDS:
        if command not in ((), ("base",)):
            text = run(*command, "--help").out
            assert all(option in text for option in ("--json", "--quiet", "--registry", "--debug"))


def test_train_has_the_options_of_the_contract(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    text = run("train", "--help").out
    names = """rank alpha dropout target-modules use-rslora epochs max-steps batch-size gradient-accumulation max-length
        learning-rate scheduler warmup weight-decay seed dtype frozen save-steps resume eval-data report-to description
        pack on base data config dry-run"""
    assert not [name for name in names.split() if f"--{name}" not in text]


def test_the_version_is_told_by_the_command_and_by_the_module(run):
    text = run("--version").out
    assert re.fullmatch(r"stackctl \d+\.\d+\.\d+\S*\n", text)
    assert subprocess.check_output([sys.executable, "-m", "stackctl", "--version"], text=True) == text


# -- usage errors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ("nosuch",), ("ls", "--nosuch"), ("add",), ("add", "style"), ("base", "nosuch"), ("compose",), ("use",),
        ("rm",), ("ls", "too", "many"), ("train", "x", "--rank", "many"), ("train", "x", "--rank", "0"), ("compare",),
        ("pull",),
        ("train", "x", "--scheduler", "nosuch"), ("generate", "--max-new-tokens", "0"),
        ("generate", "base", "-p", ""), ("eval", "style"), ("export", "style"),
        ("train", "x", "--learning-rate", "nan"), ("train", "x", "--learning-rate", "inf"),
        ("train", "x", "--dropout", "1"),
        ("generate", "base", "-p", "x", "--temperature", "nan"), ("generate", "base", "-p", "x", "--top-p", "nan"),
         ("generate", "base", "-p", "x", "--dtype", "int8"),
        ("generate", "base", "-p", "x", "--temperature", "inf"), ("train", "x", "--max-steps", "0"),
        ("compose", "style", "--max-length", "8"), ("compose", "style", "--fit", "x.jsonl", "--seed", "-1"),
        ("compose", "style", "--sweep", "style=0:1:1", "--data", "mean", "--data", "x.jsonl"),
        ("export", "style", "--out", "out", "--format", "gguf", "--whole-class"),
        ("export", "style", "--out", "out", "--format", "gguf", "--dtype", "bfloat16"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_wrong_usage_is_2(filled_registry, fails, arguments):
    fails(*arguments, code=2)


@pytest.mark.parametrize(
    "more",
    [(), ("--from", "style"), ("--objective", "distil", "--teacher", "style"), ("--train-tokens", "none")],
    ids=" ".join,
)
def test_a_broken_expression_of_modules_is_2_and_told_once(filled_registry, fails, tmp_path, more):
    (tmp_path / "x.jsonl").write_text('{"text": "x"}\n')
    told = fails("train", "x", "--base", "tiny", "--data", "x.jsonl", "--target-modules", "(q_proj", *more, code=2)
    assert told.count("'(q_proj' is not a regular expression") == 1


def test_an_option_without_its_value_is_2(run):
    for arguments in (("train", "x", "--rank"), ("eval", "style", "--data"), ("ls", "--registry")):
        ran = run(*arguments, code=2)
        assert ran.err.startswith("error: ")


def test_a_mistyped_command_and_option_are_answered_with_the_nearest(filled_registry, fails):
    assert "train" in fails("trian", code=2)
    assert "--batch-size" in fails("train", "--bath-size", "3", code=2)


def test_options_stand_after_the_commands_name_in_any_order(filled_registry, run):
    root = str(filled_registry.root)
    for arguments in (
        ("ls", "--registry", root, "--json"),
        ("ls", "--json", f"--registry={root}"),
        ("compose", "--json", "style+tone", "--registry", root, "--dry-run"),
        ("compose", "style+tone", "--dry-run", "--registry", root, "--json"),
    ):
        assert run(*arguments).json["schema"] == 1


def test_two_dashes_end_the_options(filled_registry, fails, run):
    assert "'--json'" in fails("compose", "--", "--json", code=2)
    plain = run("compose", "--", "--json", code=2)
    assert plain.out == ""  # a word behind -- is no option: nobody asked for JSON
    assert run("inspect", "--json", "--", "style").json["adapter"] == "style"


def test_debug_shows_the_traceback_and_nothing_else_does(filled_registry):
    command = [sys.executable, "-m", "stackctl", "inspect", "nosuch"]
    environment = {**os.environ, "STACKCTL_REGISTRY": str(filled_registry.root)}
    plain = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert plain.returncode == 3
    assert "Traceback" not in plain.stderr
    debugged = subprocess.run([*command, "--debug"], capture_output=True, text=True, env=environment)
    assert "Traceback" in debugged.stderr


# -- the registry in use ----------------------------------------------------------------------------------------------


def test_init_makes_a_registry_and_leaves_an_old_one_alone(run, tmp_path):
    made = run("init", "--json").json
    assert made == {"schema": 1, "registry": str(tmp_path / "registry"), "created": True}
    before = (tmp_path / "registry" / "registry.yaml").read_bytes()
    assert run("init", "--json").json["created"] is False
    assert (tmp_path / "registry" / "registry.yaml").read_bytes() == before
    assert run("init", "elsewhere/deep", "-q").out == f"{tmp_path / 'elsewhere' / 'deep'}\n"
    assert (tmp_path / "elsewhere" / "deep" / "registry.yaml").is_file()


def test_the_registry_is_the_option_then_the_variable_then_the_nearest_upward(run, tmp_path, monkeypatch):
    for name in ("near", "variable", "option"):
        run("init", tmp_path / name / "registry")
    inner = tmp_path / "near" / "a" / "b"
    inner.mkdir(parents=True)
    monkeypatch.chdir(inner)
    assert run("ls", "--json").json["registry"] == str(tmp_path / "near" / "registry")
    monkeypatch.setenv("STACKCTL_REGISTRY", str(tmp_path / "variable" / "registry"))
    assert run("ls", "--json").json["registry"] == str(tmp_path / "variable" / "registry")
    option = run("ls", "--json", "--registry", "../../../option/registry").json
    assert option["registry"] == str(tmp_path / "option" / "registry")


def test_init_without_a_folder_makes_the_registry_that_is_asked_for(run, tmp_path, monkeypatch):
    monkeypatch.setenv("STACKCTL_REGISTRY", str(tmp_path / "variable"))
    assert run("init", "--json").json["registry"] == str(tmp_path / "variable") == run("ls", "--json").json["registry"]
    assert run("init", "given", "--json").json["registry"] == str(tmp_path / "given")
    assert run("init", "--registry", "option", "--json").json["registry"] == str(tmp_path / "option")


def test_without_a_registry_the_hint_is_init(fails, monkeypatch, tmp_path):
    assert fails("ls", code=3).endswith("| stackctl init")
    assert fails("ls", "--registry", tmp_path / "no where", code=3).count("stackctl init") == 1
    monkeypatch.setenv("STACKCTL_REGISTRY", str(tmp_path / "nowhere"))
    assert "stackctl init" in fails("ls", code=3)


@pytest.mark.parametrize(
    "text", ["schema: 2\n", "schema: 1\nschema: 1\n", "schema: 1\nnosuch: 2\n", "!!x {}\n", "a\0b", "[]"]
)
def test_a_registry_file_that_is_not_ours_is_refused(filled_registry, fails, text):
    (filled_registry.root / "registry.yaml").write_text(text)
    assert "registry.yaml" in fails("ls", code=2)


# -- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["base", "../x", "", "-x", "x" * 65, "a+b", "ä", "a\n", "a\0b", "/etc"])
def test_a_reserved_or_escaping_name_is_2(filled_registry, fails, tmp_path, name):
    folder = write_checkpoint(tmp_path / "checkpoint")
    before = {path for path in tmp_path.rglob("*") if path.name != ".lock"}
    fails("add", "--base", "tiny", "--", name, folder, code=2)
    fails("base", "add", "--", name, folder, code=2)
    if name != "a+b":
        fails("compose", "style", f"--name={name}", code=2)
    (tmp_path / "x.jsonl").write_text('{"text": "x"}\n')
    fails("train", "--base", "tiny", "--data", tmp_path / "x.jsonl", "--", name, code=2)
    (tmp_path / "x.jsonl").unlink()
    assert {p for p in tmp_path.rglob("*") if p.name != ".lock"} == before


def test_a_taken_name_is_2(filled_registry, fails, run, tmp_path):
    run("compose", "style+tone", "--name", "duo")
    folder = write_checkpoint(tmp_path / "checkpoint")
    assert "stack" in fails("add", "duo", folder, "--base", "tiny", code=2)
    assert "adapter" in fails("compose", "style+tone", "--name", "tone", code=2)
    fails("train", "duo", "--base", "tiny", "--data", tmp_path / "checkpoint" / "adapter_config.json", code=2)


@pytest.mark.parametrize("name", ["keys", "forward", "lora", "default", "0", "x" * 64, "a.b_c-d", "training"])
def test_words_of_other_programs_are_fine_names(filled_registry, run, tmp_path, name):
    folder = write_checkpoint(tmp_path / "checkpoint")
    assert run("add", name, folder, "--base", "tiny", "-q").out == f"{name}@1\n"
    assert run("inspect", name, "--json").json["adapter"] == name


@pytest.mark.parametrize(
    ("arguments", "nearest"),
    [
        (("inspect", "stile"), "style"), (("generate", "styl", "-p", "x"), "style"),
        (("verify", "instruc"), "instruct"),
        (("compose", "style+instrct"), "instruct"), (("compare", "base", "tonne", "-p", "x"), "tone"),
        (("eval", "tune", "--data", "x.jsonl"), "tone"), (("export", "stylo", "--out", "o"), "style"),
        (("rm", "toney"), "tone"), (("use", "duoo"), "duo"), (("base", "rm", "tinny"), "tiny"),
        (("add", "x", ".", "--base", "tinny"), "tiny"), (("inspect", "style@7"), "style@1"),
        (("compose", "style+instruct@3"), "instruct@1"), (("rm", "tone@2"), "tone@1"),
        (("train", "x", "--on", "stlye", "--data", "x.jsonl"), "style"),
        (("push", "stlye", "me/x", "--dry-run"), "style"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else value,
)  # fmt: skip
def test_what_is_not_there_is_3_and_the_hint_names_the_nearest(
    filled_registry, fails, run, tmp_path, arguments, nearest
):
    run("compose", "style+tone", "--name", "duo")
    (tmp_path / "x.jsonl").write_text('{"text": "x"}\n')
    write_checkpoint(tmp_path)
    said = fails(*arguments, code=3)
    assert nearest in said.partition(" | ")[2]


@pytest.mark.parametrize(
    "arguments",
    [("inspect", "./nosuch"), ("add", "x", "nosuch"), ("base", "add", "x", "./nosuch"),
     ("base", "add", "x", "nosuch.gguf"),
     ("train", "x", "--base", "tiny", "--data", "nosuch.jsonl"), ("generate", "style", "--prompts", "nosuch.txt"),
     ("eval", "style", "--data", "nosuch.jsonl"), ("train", "--config", "nosuch.yaml"),
     ("train", "x", "--base", "tiny", "--config", "nosuch.json")],
    ids=" ".join,
)  # fmt: skip
def test_a_missing_file_is_3(filled_registry, fails, arguments):
    fails(*arguments, code=3)


@pytest.mark.parametrize(
    "arguments",
    [("add", "x", "file"), ("base", "add", "x", "file"), ("train", "x", "--base", "tiny", "--data", "folder"),
     ("generate", "style", "--prompts", "folder"), ("eval", "style", "--data", "folder"),
     ("train", "--config", "folder"),
     ("inspect", "./file"), ("init", "file")],
    ids=" ".join,
)  # fmt: skip
def test_the_wrong_kind_of_file_is_2(filled_registry, fails, tmp_path, arguments):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    fails(*arguments, code=2)


# -- streams ----------------------------------------------------------------------------------------------------------


def test_a_warning_goes_to_stderr_and_leaves_one_document_on_stdout(filled_registry, run):
    ran = run("compose", "instruct", "--name", "alone", "--json")
    assert ran.json["stack"] == "alone"
    assert "note: " in ran.err
    register(filled_registry, "instruct", ["style@1"], seed=9)
    ran = run("inspect", "alone", "--json")
    assert len(ran.out.splitlines()) == 1
    assert "instruct@2" in ran.err


def test_quiet_prints_the_essential_name_and_no_notes(filled_registry, run):
    ran = run("compose", "instruct", "--name", "alone", "-q")
    assert (ran.out, ran.err) == ("alone\n", "")


def test_what_is_piped_holds_no_escape_codes(filled_registry, run, monkeypatch):
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "xterm-256color")
    run("compose", "style+tone")
    for arguments in (("ls",), ("inspect", "style+tone"), ("inspect", "style"), ("ls", "--help"), ("base", "ls")):
        ran = run(*arguments)
        assert "\x1b" not in ran.out + ran.err


@pytest.mark.parametrize("arguments", [("ls",), ("ls", "--help"), ("inspect", "nosuch"), ("inspect", "style+tone")])
@pytest.mark.parametrize("no_color", [True, False])
def test_no_color_is_obeyed_on_a_terminal(filled_registry, arguments, no_color):
    import pty

    environment = {**os.environ, "TERM": "xterm-256color", "STACKCTL_REGISTRY": str(filled_registry.root)}
    environment.pop("NO_COLOR", None)
    if no_color:
        environment["NO_COLOR"] = "1"
    parent, child = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "stackctl", *arguments], stdin=child, stdout=child, stderr=child, env=environment
    )
    os.close(child)
    shown = b""
    while True:
        try:
            piece = os.read(parent, 65536)
        except OSError:  # Linux says so when the other end is closed
            break
        if not piece:
            break
        shown += piece
    os.close(parent)
    process.wait()
    assert shown
    assert (b"\x1b[" in shown) is not no_color


def test_a_reader_that_goes_away_is_no_traceback(filled_registry):
    command = f"{sys.executable} -m stackctl inspect style --json | true"
    done = subprocess.run(
        ["bash", "-c", command],
        capture_output=True,
        text=True,
        env={**os.environ, "STACKCTL_REGISTRY": str(filled_registry.root)},
    )
    assert "Traceback" not in done.stderr
    assert "error" not in done.stderr


def test_json_is_utf8_whatever_the_locale(filled_registry, tmp_path):
    folder = write_checkpoint(tmp_path / "ключ 灯")
    environment = {
        **os.environ,
        "STACKCTL_REGISTRY": str(filled_registry.root),
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
    }
    command = [sys.executable, "-m", "stackctl", "inspect", str(folder), "--json"]
    done = subprocess.run(command, capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.decode())["path"] == str(Path(folder))
