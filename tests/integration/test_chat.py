"""A chat on a real terminal: what is typed, what is shown, and what the conversation is afterwards."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import oracle
import pytest
from terminal import Terminal
from tiny import random_adapter

LENGTH = 12
OPTIONS = ["--max-new-tokens", LENGTH]
SAME = "the answer is the same"
COMMANDS = ("/use", "/system", "/retry", "/undo", "/reset", "/save", "/help", "/exit")


@pytest.fixture
def h(tiny_registry: Any) -> Any:
    found = tiny_registry()
    found.add("style", seed=1)
    found.add("instruct", seed=2)
    return found


@pytest.fixture
def chat(h: Any, tmp_path: Path) -> Iterator[Any]:
    opened: list[Terminal] = []

    def start(*arguments: object, forked: bool = True) -> Terminal:
        terminal = Terminal(["generate", *arguments], tmp_path, forked=forked)
        opened.append(terminal)
        return terminal

    yield start
    for terminal in opened:
        terminal.close()


def records(path: Path) -> list[list[dict[str, str]]]:
    return [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").splitlines()]


def answer(h: Any, stack: str, messages: list[dict[str, str]], *options: object) -> str:
    """What ``generate`` writes to a conversation."""
    file = oracle.write_jsonl(h.folder / "asked.jsonl", [{"messages": messages}])
    ran = h.run("generate", stack, "--prompts", file, *OPTIONS, "--json", *options)
    return str(ran.json["text"])


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def test_a_conversation(h: Any, chat: Any, tmp_path: Path) -> None:
    """Several turns, another stack in between, back again, and the record is one that train reads."""
    t = chat("style", *OPTIONS, forked=False)
    t.wait_for_prompt()

    def type_line(text: str) -> str:
        t.type(text + "\r")
        return str(t.wait_for_prompt())

    type_line("Hi")
    type_line("/save one.jsonl")
    hi = [user("Hi"), said(answer(h, "style", [user("Hi")]))]
    assert records(tmp_path / "one.jsonl") == [hi]

    t.type("and\\\r")  # two ways to begin another line
    t.wait_for_prompt()
    t.type("Who?\x1b\rNow\r")
    t.wait_for_prompt()
    type_line("/save one.jsonl")
    longer = [*hi, user("and\nWho?\nNow")]
    longer.append(said(answer(h, "style", longer)))
    assert records(tmp_path / "one.jsonl") == [hi, longer]

    assert "now style@1+instruct@1" in type_line("/use style+instruct")
    type_line("/reset")
    type_line("/system Be brief.")
    type_line("Who?")
    type_line("/save two.jsonl")
    brief = [{"role": "system", "content": "Be brief."}, user("Who?")]
    assert records(tmp_path / "two.jsonl") == [[*brief, said(answer(h, "style+instruct", brief))]]

    type_line("/use style")
    type_line("/system")
    type_line("/undo")
    type_line("Hi")
    assert SAME in type_line("/retry")
    type_line("/save three.jsonl")
    assert records(tmp_path / "three.jsonl") == [hi], "back on style, it is style again"
    other = answer(h, "instruct", [user("Hi")])
    assert other != hi[1]["content"]
    type_line("/use instruct")
    assert SAME not in type_line("/retry"), "another stack answers otherwise"
    type_line("/save four.jsonl")
    assert records(tmp_path / "four.jsonl") == [[user("Hi"), said(other)]]
    t.type("/exit\r")
    assert t.wait() == 0
    h.train("third", "--max-steps", 1, on="style", records=[{"messages": m} for m in records(tmp_path / "one.jsonl")])


def test_another_stack_brings_its_template_to_a_base_without_one(
    models: Any, run: Any, chat: Any, tmp_path: Path
) -> None:
    """As ``generate`` has it, whichever stack the chat began with."""
    base = Path(shutil.copytree(models("llama"), tmp_path / "base"))
    (base / "chat_template.jinja").unlink()
    run("init")
    run("base", "add", "tiny", base)
    for name, template in (("plain", None), ("own", "{% for m in messages %}<{{ m.content }}>{% endfor %}")):
        adapter = random_adapter(base, tmp_path / f"{name}-adapter", seed=len(name))
        if template:
            (adapter / "chat_template.jinja").write_text(template)
        run("add", name, adapter)
    t = chat("plain", *OPTIONS)
    assert "ChatML is used" in t.wait_for_prompt()
    said = []
    for number, (name, told) in enumerate((("own", "that of own@1 is used"), ("plain", "ChatML is used"))):
        t.type(f"/use {name}\r")
        assert told in t.wait_for_prompt()
        for line in ("/reset", "Hi", f"/save {number}.jsonl"):
            t.type(f"{line}\r")
            t.wait_for_prompt()
        said.append(records(tmp_path / f"{number}.jsonl")[0][1]["content"])
        assert said[-1] == run("generate", name, "-p", "Hi", *OPTIONS, "--json").json["text"]
    assert said[0] != said[1]
    t.type("/exit\r")
    assert t.wait() == 0


def test_what_goes_wrong_is_said_and_the_chat_goes_on(h: Any, chat: Any, models: Any, tmp_path: Path) -> None:
    h.run("base", "add", "other", models("gpt2"))
    h.run("add", "elsewhere", oracle_adapter(models("gpt2"), tmp_path / "elsewhere"), "--base", "other")
    t = chat("style", *OPTIONS)
    t.wait_for_prompt()
    for typed, expected in {
        "/uses style": "did you mean '/use'?",
        "/nonsense": "/help lists them",
        "/use stile": "did you mean 'style'?",
        "/use elsewhere": "has the base 'other'",
        "/use style+": "error:",
        "/save chat.txt": "/save chat.jsonl",
        "/save chat.jsonl": "the conversation is empty",
        "/undo": "the conversation is empty",
        "x" * 600: "reads 512 at once",
    }.items():
        t.type(typed + "\r")
        t.wait_for(expected)
        t.wait_for_prompt()
    t.type("/help\r")
    shown = t.wait_for_prompt()
    assert all(command in shown for command in COMMANDS)
    t.type("/use sty\t")
    t.wait_for("le")
    t.type("\x03")  # a line that is not wanted after all
    t.wait_for_prompt()
    t.type("Hi\r")
    t.wait_for_prompt()
    t.type("/save chat.jsonl\r")
    t.wait_for_prompt()
    assert records(tmp_path / "chat.jsonl") == [[user("Hi"), said(answer(h, "style", [user("Hi")]))]]
    t.type("\x04")
    assert t.wait() == 0


def oracle_adapter(base: Path, out: Path) -> Path:
    from tiny import random_adapter

    return random_adapter(base, out, seed=3)


def test_a_conversation_longer_than_the_context(h: Any, chat: Any, tmp_path: Path) -> None:
    t = chat("style", *OPTIONS)
    t.wait_for_prompt()
    texts = [letter * 150 for letter in "abcd"]
    for text in texts:
        t.type(text + "\r")
        shown = t.wait_for_prompt()
    left_out = re.search(r"longer than the context: the oldest (\d) messages are not read", shown)
    assert left_out
    t.type("/save long.jsonl\r")
    t.wait_for_prompt()
    (whole,) = records(tmp_path / "long.jsonl")
    assert [m["content"] for m in whole if m["role"] == "user"] == texts, "nothing is lost from the record"
    kept = whole[int(left_out[1]) : -1]
    assert kept[0]["role"] == kept[-1]["role"] == "user"
    assert whole[-1] == said(answer(h, "style", kept))
    t.type("\x04")
    assert t.wait() == 0


def test_ctrl_c_stops_an_answer_which_stays_as_it_is(h: Any, chat: Any, tmp_path: Path) -> None:
    drawn = ("--max-new-tokens", 400, "--temperature", 1.5)  # what is drawn cannot be guessed, and takes its time
    answers = (
        (seed, h.run("generate", "style", "-p", "Hi", *drawn, "--seed", seed, "--json").json) for seed in range(50)
    )
    seed, whole = next((seed, answer["text"]) for seed, answer in answers if answer["new_tokens"] == 400)
    for number in range(10):  # on a busy machine an answer may be whole before the key is pressed
        t = chat("style", *drawn, "--seed", seed)
        t.wait_for_prompt()
        t.type("Hi\r")
        t.wait_for_answer()
        t.type("\x03")
        t.wait_for_prompt()
        t.type(f"/save stopped{number}.jsonl\r")
        t.wait_for_prompt()
        t.type("\x04")
        assert t.wait() == 0
        (found,) = records(tmp_path / f"stopped{number}.jsonl")
        if len(found[1]["content"]) < len(whole):
            break
    assert found[0] == user("Hi")
    assert 0 < len(found[1]["content"]) < len(whole)
    assert whole.startswith(found[1]["content"])


def test_a_chat_has_no_json_and_no_output(h: Any, chat: Any) -> None:
    for option in (["--json"], ["--output", "x.txt"]):
        t = chat("style", *option)
        t.wait_for("hint:")
        assert t.wait() == 2
