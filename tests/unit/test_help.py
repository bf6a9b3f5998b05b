"""Help is readable on a narrow and on a wide terminal, its examples are commands, and a mistyped word is recognised."""

from __future__ import annotations

import re
import shlex
from typing import Any

import pytest
import typer
from checkpoints import make_registry, register

from stackctl.cli import make_app
from stackctl.cli.help_page import COMMON, WIDTH, argument_label, option_choices, option_default

APP: Any = typer.main.get_command(make_app())


def every_command() -> dict[str, Any]:
    """The words that call a command, and the command."""
    found = {"": APP}
    for name, command in APP.commands.items():
        found[name] = command
        found |= {f"{name} {inner}": it for inner, it in getattr(command, "commands", {}).items()}
    return found


COMMANDS = every_command()
commands = pytest.mark.parametrize("words", COMMANDS, ids=lambda words: words or "stackctl")


@pytest.fixture
def filled_registry(run: Any, tmp_path: Any) -> None:
    """A registry with one adapter, in the working directory."""
    register(make_registry(tmp_path / "registry"), "style", seed=1)


def page(run: Any, words: str) -> list[str]:
    return run(*words.split(), "--help").out.splitlines()


@commands
@pytest.mark.parametrize("columns", [80, 200])
def test_the_page_fits_and_leaves_room_for_the_text(run: Any, monkeypatch: Any, words: str, columns: int) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = page(run, words)
    examples = COMMANDS[words].epilog.splitlines()
    assert lines[-len(examples) :] == examples
    rest = lines[: -len(examples)]
    assert max(map(len, rest)) <= min(columns, WIDTH)
    labels = [m for line in rest if (m := re.match(r"  (\S.*?)(  +|$)", line))]
    assert labels
    assert max(m.end() for m in labels if m[2]) <= 34  # where the text begins: 45 columns are left of 80
    assert "|" not in "".join(rest)


@commands
def test_every_option_stands_once_in_a_group_with_its_default(run: Any, monkeypatch: Any, words: str) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    lines = page(run, words)
    text = "\n".join(lines)
    monkeypatch.setenv("COLUMNS", "40")
    assert page(run, words)[-1] == COMMANDS[words].epilog.splitlines()[-1], "as one types it, however narrow"
    for option in COMMANDS[words].params:
        if option.param_type_name != "option" or option.hidden:
            continue
        for name in (*option.opts, *option.secondary_opts):
            assert len(re.findall(rf"^  (?:.*, )?{re.escape(name)}\b(?!-)", text, re.MULTILINE)) == 1, name
        assert option.help, f"{option.name} has no words"
        if default := option_default(option):
            assert f"default {default}]" in text
        assert all(choice in text for choice in option_choices(option))
    if words:
        assert COMMON in lines
        assert lines.index(COMMON) > max((i for i, line in enumerate(lines) if line == "Arguments"), default=0)


@commands
def test_an_argument_is_called_in_its_group_as_in_the_usage_line(run: Any, monkeypatch: Any, words: str) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    lines = page(run, words)
    usage = next(line for line in lines if "stackctl" in line)
    wanted = [option.metavar for option in COMMANDS[words].params if option.param_type_name == "argument"]
    labels = [argument_label(metavar) for metavar in wanted]
    for metavar, label in zip(wanted, labels, strict=True):
        assert metavar in usage
        assert label.count("[") == label.count("]")
        assert sum(line.startswith(f"  {label}  ") for line in lines) == 1


@commands
def test_the_examples_are_commands(words: str) -> None:
    for line in COMMANDS[words].epilog.splitlines():
        program, *rest = shlex.split(line)
        assert program == "stackctl"
        assert line.startswith(f"stackctl {words}".strip())
        command = APP
        while hasattr(command, "commands") and rest and rest[0] in command.commands:
            command, rest = command.commands[rest[0]], rest[1:]
        if rest or not hasattr(command, "commands"):
            command.make_context(line, rest)


def test_train_says_first_what_it_trains_and_last_what_all_commands_have(run: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    titles = [line for line in page(run, "train") if re.fullmatch(r"[A-Z][\w -]+", line)]
    assert titles == [
        "Arguments", "What is trained", "The adapter", "Training", "Held-out records", "Device and precision",
        "The run", "Common", "Examples",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("trian style", "did you mean 'train'?"),
        ("compse style", "did you mean 'compose'?"),
        ("base lss", "did you mean 'ls'?"),
        ("train x --ranc 3", "did you mean '--rank'?"),
        ("generate base -p x --temprature 1", "did you mean '--temperature'?"),
        ("train x --scheduler cosin", "did you mean 'cosine'?"),
        ("export style --format modell --out x", "did you mean 'model'?"),
        ("generate base -p x --dtype float23", "did you mean 'float32'?"),
        ("compose style --method tie", "did you mean 'ties'?"),
        ("--json ls", "options come after the command: stackctl COMMAND --json"),
        ("add style", "stackctl add --help"),
    ],
)
def test_a_mistyped_word_is_recognised(filled_registry: Any, run: Any, typed: str, meant: str) -> None:
    error, hint = run(*typed.split(), code=2).err.splitlines()
    assert hint.startswith(f"hint: {meant}")
    said = error.removeprefix("error: ")
    assert not said[0].isupper()
    assert not said.endswith(".")


def test_what_is_missing_is_named_as_the_help_names_it(run: Any) -> None:
    assert "missing argument 'NAME'" in run("add", code=2).err
    assert "missing argument 'PATH'" in run("add", "style", code=2).err
    assert "add NAME PATH [OPTIONS]" in run("add", "--help").out


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("inspect stlye", "did you mean 'style'?"),
        ("use dou", "did you mean 'duo'?"),
        ("rm styl", "did you mean 'style'?"),
        ("base rm tiyn", "did you mean 'tiny'?"),
        ("train x --on style --data x.jsonl --base tiyn", "did you mean 'tiny'?"),
        ("compose style+stile", "did you mean 'style'?"),
    ],
)
def test_a_mistyped_name_is_recognised(filled_registry: Any, run: Any, typed: str, meant: str) -> None:
    run("compose", "style", "--name", "duo")
    assert meant in run(*typed.split(), code=3).err.splitlines()[-1]


@pytest.mark.parametrize("text", ["dta: x.jsonl\n", "train:\n  x: {dta: x.jsonl}\n"])
def test_a_mistyped_key_is_recognised_without_a_list_of_all(
    filled_registry: Any, run: Any, tmp_path: Any, text: str
) -> None:
    (tmp_path / "file.yaml").write_text(text)
    name = [] if text.startswith("train") else ["x"]
    assert run("train", *name, "--config", "file.yaml", code=2).err.splitlines()[-1] == "hint: did you mean 'data'?"


@pytest.mark.parametrize(
    ("typed", "said", "hint"),
    [
        ("generate base -p x --top-p 2", "2.0 is not between 0 and 1", "stackctl generate --help"),
        ("generate base -p x --max-new-tokens 0", "0 is less than 1", "stackctl generate --help"),
        ("train x --rank many", "'many' is not a whole number", "stackctl train --help"),
        ("train x --rank 0 --data x.jsonl", "--rank: expected a whole number >= 1", "stackctl train --help"),
        ("train x --batch-size many --data x.jsonl", "--batch-size: expected a whole number or 'auto', got 'many'",
         "stackctl train --help"),
        ("compose style --method svd --rank all", "--rank: expected a whole number or 'auto', got 'all'",
         "stackctl compose --help"),
        ("train x --learning-rate fast", "'fast' is not a number", "stackctl train --help"),
        ("generate base -p", "-p needs a value", "stackctl generate --help"),
        ("ls style", "there is nothing that 'style' could mean here", "stackctl ls --help"),
        ("base add other", "a source for 'other' is missing", "stackctl base add other org/model (or a folder)"),
        ("export style --modelfile --out x", "--modelfile belongs to --format gguf",
         "stackctl export style --format gguf --modelfile --out x"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_plain_words(filled_registry: Any, run: Any, typed: str, said: str, hint: str) -> None:
    error, way_on = run(*typed.split(), code=2).err.splitlines()
    assert said in error
    assert way_on == f"hint: {hint}"


@pytest.mark.parametrize(
    "typed",
    ["train x --data {}", "train x --config {}", "eval style --data {}", "generate style --prompts {}"],
)
def test_a_mistyped_file_is_recognised(filled_registry: Any, run: Any, tmp_path: Any, typed: str) -> None:
    (tmp_path / "harbour.jsonl").touch()
    ran = run(*typed.format("harbuor.jsonl").split(), code=3)
    assert "harbuor.jsonl does not exist" in ran.err
    assert ran.err.splitlines()[-1] == "hint: did you mean 'harbour.jsonl'?"


def test_a_link_to_nothing_is_told_as_that(filled_registry: Any, run: Any, tmp_path: Any) -> None:
    """Its own name was suggested instead of it."""
    (tmp_path / "texts.jsonl").symlink_to("moved.jsonl")
    error, hint = run("train", "x", "--data", "texts.jsonl", code=3).err.splitlines()
    assert error == "error: the data file texts.jsonl is a link to moved.jsonl, which is not there"
    assert hint == "hint: correct the link"


def test_an_adapter_is_no_stack_to_use(filled_registry: Any, run: Any) -> None:
    error, hint = run("use", "style", code=3).err.splitlines()
    assert error == "error: 'style' is an adapter, and no stack"
    assert hint == "hint: stackctl compose style --name NAME"


@pytest.mark.parametrize("command", ["use", "rm"])
def test_a_stack_that_its_expression_would_name_is_not_found(filled_registry: Any, run: Any, command: str) -> None:
    """It was called no valid name, or not one stack."""
    error, _ = run(command, "tone+style", code=3).err.splitlines()
    assert error == "error: there is no stack 'tone+style'"
    run(command, "tone:2+style", code=2)
