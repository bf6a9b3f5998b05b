"""``inspect --output``: one page with everything, whole in itself, and safe whatever stands in files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from webpage import Page

HOSTILE = "</title></dd></text><script>alert(1)</script><img src=x onerror=alert(2)>\"'&{{ 7*7 }}"


@pytest.fixture
def stack(h: Any) -> Any:
    """storyteller = style + instruct on it + tone, with a curve of style's training."""
    h.add("style", seed=1)
    log = "".join(json.dumps({"step": n, "loss": 4 - n / 10}) + "\n" for n in range(1, 20))
    (h.weights("style") / "training_log.jsonl").write_text(log)
    h.add("instruct", seed=2, r=3)
    h.add("tone", seed=3, target_modules=["q_proj", "lm_head"])
    h.run("compose", "style+instruct+tone", "--name", "storyteller")
    return h


def read(path: Path) -> Page:
    page = Page(path.read_text(encoding="utf-8"))
    page.check_self_contained()
    return page


def boxes(page: Page, *looks: str) -> list[dict[str, str]]:
    return [a for tag, a, _ in page.elements if tag == "rect" and set(looks) & set(a.get("class", "").split())]


def test_a_stack_is_shown_whole(stack: Any) -> None:
    told = stack.run("inspect", "storyteller", "--output", "page.html", "--json").json
    assert told["page"] == str(stack.folder / "page.html")
    assert not {"weights", "interference", "curves"} & set(told)  # what was not asked for by name
    page = read(stack.folder / "page.html")
    assert page.texts("h1") == ["stack storyteller"]
    assert page.texts("h2") == [
        "Members", "Lineage", "Norms of the deltas", "Interference between members",
        "Losses of the training",
    ]  # fmt: skip
    titles = page.texts("title")
    for title in ("of the sum", "of style@1", "of instruct@1", "of tone@1"):
        assert f"‖ΔW‖ {title}" in page.texts("figcaption")
    measured = stack.run("inspect", "storyteller", "--weights", "--interference", "--json").json
    for row in measured["weights"]:
        if row["module"] != "lm_head":
            assert f"{row['module']}: {row['norm']:.3g}" in titles
    assert len(boxes(page, "heat")) == 14 + 14 + 14 + 2 + 4 * 10  # and the scale of each map
    for pair in measured["interference"]["pairs"]:
        one, other = pair["members"]
        assert f"{one} and {other}: {pair['cosine']:+.3f}" in titles
        assert f"{one} × {other}" in page.texts("bdi")
    assert {"style@1", "instruct@1", "tone@1"} <= set(page.texts("text", "node"))
    assert any("lm_head" in text for text in page.texts("code"))


def test_a_page_says_nothing_of_where_files_lie(stack: Any) -> None:
    for what in ("storyteller", "style", stack.paths["tone"]):
        stack.run("inspect", what, "--output", "page.html")
        assert str(stack.folder) not in (stack.folder / "page.html").read_text()


def test_an_adapter_and_a_checkpoint_have_pages_too(stack: Any) -> None:
    stack.run("inspect", "style", "--output", "style.html", "--weights")
    page = read(stack.folder / "style.html")
    assert page.texts("h1") == ["adapter style@1"]
    assert "Interference between members" not in page.texts("h2")
    assert "Losses of the training" in page.texts("h2")
    stack.run("inspect", stack.paths["tone"], "--output", "tone.html")
    page = read(stack.folder / "tone.html")
    assert page.texts("h2") == ["Norms of the deltas"]


def test_what_hostile_files_say_is_text(stack: Any) -> None:
    entry = stack.folder / "registry/adapters/style.yaml"
    entry.write_text(entry.read_text().replace("description: ''", f"description: {json.dumps(HOSTILE)}"))
    assert HOSTILE in stack.run("inspect", "style", "--json").json["description"]
    stack.run("inspect", "style", "--output", "page.html")
    page = read(stack.folder / "page.html")
    assert HOSTILE in page.texts("dd")
    folder = stack.paths["tone"]
    tensors = load_file(folder / "adapter_model.safetensors")
    bad = {name.replace("layers.0", f"layers.0.{HOSTILE}"): value for name, value in tensors.items()}
    save_file(bad, folder / "adapter_model.safetensors", {"format": "pt"})
    stack.run("inspect", folder, "--output", "page.html")
    page = read(stack.folder / "page.html")
    assert any(HOSTILE in problem for problem in page.texts("p"))  # its base has no such modules
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "nobody/knows"}))
    stack.run("inspect", folder, "--output", "page.html")
    page = read(stack.folder / "page.html")
    assert any(HOSTILE in title for title in page.texts("title"))


def test_what_cannot_be_written_is_said_before_anything_is_read(stack: Any, fails: Any) -> None:
    fails("inspect", "storyteller", "--output", "nosuch/page.html", code=3)
    fails("inspect", "storyteller", "--output", "page.txt", code=2)
    fails("inspect", "base", "--output", "page.html", code=2)
    assert not list(stack.folder.glob("*.html"))
