"""compare: answers and scores of one run, on the terminal, as JSON and as a page; what is wrong is said in advance."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_registry import CHAT, TEXTS
from webpage import Page

STACKS = ("base", "style", "style+instruct")


def test_scores_are_those_of_eval_and_the_base_is_loaded_once(
    style_and_instruct: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stackctl.engine import models

    h, loads = style_and_instruct, []
    original = models.load_base
    monkeypatch.setattr(models, "load_base", lambda *a, **k: loads.append(a) or original(*a, **k))
    data = ("--data", h.data(TEXTS, "texts.jsonl").name, "--data", h.data(CHAT, "chat.jsonl").name, "--max-length", 24)
    prompts = ("-p", "Hi", "-p", "Who?", "--max-new-tokens", 4)
    found = h.run("compare", *STACKS, *prompts, *data, "--json").json
    assert len(loads) == 1
    assert found["scores"] == h.run("eval", *STACKS, *data, "--json").json["results"]
    assert len(found["scores"]) == 6 and found["path"] is None
    alone = h.run("compare", *STACKS, *prompts, "--json").json
    texts = [row["text"] for row in found["results"]]
    assert texts == [row["text"] for row in alone["results"]], "measuring changes no answer"
    assert alone["scores"] == []
    assert [(row["stack"], row["prompt"]) for row in found["results"]] == [
        (stack, prompt) for prompt in ("Hi", "Who?") for stack in STACKS
    ]
    assert all(row["rounding_error"] < 1e-5 for row in found["results"])
    shown = h.run("compare", *STACKS, *prompts, *data).out
    assert "perplexity" in shown and "texts.jsonl" in shown and all(stack in shown for stack in STACKS)


def test_the_page_has_what_the_json_has(style_and_instruct: Any, tmp_path: Path) -> None:
    h = style_and_instruct
    data, prompts = h.data(TEXTS, "held-out.jsonl"), h.folder / "prompts.jsonl"
    hostile = "<script>alert('x')</script> & \"so\" on"
    prompts.write_text(json.dumps({"prompt": hostile}) + '\n"Who?"\n')
    how = ("--temperature", 0.9, "--seed", 7, "--max-new-tokens", 6, "--system", "Be <b>brief</b>.", "--stop", "<|")
    asked = ("compare", *STACKS, "--prompts", prompts, "--data", data, *how)
    place = tmp_path / "report.html"
    found = h.run(*asked, "--output", place, "--json").json
    assert found["path"] == str(place)
    page = Page(place.read_text(encoding="utf-8"))
    page.check_self_contained()
    texts = [row["text"].strip() or "no text" for row in found["results"]]
    assert page.texts("p", "text") == texts
    assert page.texts("div", "text") == [hostile, "Who?"]
    assert page.texts("caption") == [str(data)]
    losses = [f"{row['loss']:.4f}" for row in found["scores"]]
    assert [cell for cell in page.texts("td") if cell in losses] == losses
    settings = dict(zip(page.texts("dt"), page.texts("dd"), strict=True))
    assert settings["style+instruct"] == "style@1+instruct@1"
    assert settings["computed in"] == "float32 on cpu"
    assert settings["system message"] == "Be <b>brief</b>."
    assert "temperature 0.9" in settings["answers"] and "seed 7" in settings["answers"]
    assert "at most 6 tokens" in settings["answers"] and "'<|'" in settings["answers"]
    assert settings["base"].startswith("tiny") and str(h.base) not in page.html, "no path of this machine's"

    said = h.run(*asked, "--output", place)
    assert "report.html" in said.out and "perplexity" in said.out and "Who?" not in said.out
    assert h.run(*asked, "--output", place, "-q").out == f"{place}\n"


def test_everything_that_is_wrong_is_said_before_anything_is_loaded(
    style_and_instruct: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stackctl.engine import models

    monkeypatch.setattr(models, "load_base", lambda *_, **__: pytest.fail("the base was loaded"))
    h = style_and_instruct
    (h.folder / "bad.jsonl").write_text('{"text": "x"}\n{"txt": 1}\n')
    (h.folder / "folder.html").mkdir()
    wrong = h.run(
        "compare", "base", "styel", "-p", "", "--stop", "", "--output", "none/report.pdf",
        "--data", "bad.jsonl", "--data", "nosuch.jsonl", "--json", code=2,
    ).json["error"]  # fmt: skip
    for part in (
        "is empty",
        "styel",
        "--stop",
        "not the name of a page",
        "none does not exist",
        "line 2",
        "nosuch.jsonl",
    ):
        assert part in wrong["message"], part
    assert "did you mean 'style'" in wrong["hint"] and ".html" in wrong["hint"]
    for place, code in (("report", 2), ("folder.html", 2), ("none/report.html", 3), ("bad.jsonl/report.html", 2)):
        h.run("compare", "base", "style", "-p", "x", "--output", place, code=code)
    assert not (h.folder / "none").exists()
