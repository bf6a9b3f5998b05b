"""Pages are whole in themselves, whatever is put into them, and are written whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest
from webpage import Page

from stackctl import __version__
from stackctl.core.errors import NotFound, StackctlError, Usage
from stackctl.render import html as pages

HOSTILE = [
    "<script>alert(1)</script>",
    "</title></style><img src=x onerror=alert(1)>",
    "\"quoted\" 'and' `ticked` & &amp; &#60;b&#62;",
    "{{ 7 * 7 }} {% include 'shell.html' %}",
    "\u202eright to left override, and שלום عالم",
    "]]> --> <!-- <![CDATA[",
    "x" * 5000,
    "two\nlines\tand a tab",
]
TEMPLATES = sorted(path for path in pages._TEMPLATES.glob("*.html"))


@pytest.mark.parametrize("text", HOSTILE)
def test_whatever_is_put_into_a_page_stays_text(text: str) -> None:
    page = Page(pages.render_page("shell.html", title=text))
    page.check_self_contained()
    assert page.texts("h1") == page.texts("title") == [text]
    assert f"stackctl {__version__}" in page.texts("footer")[0]


def test_parts_escape_and_mark() -> None:
    source = (
        '{% extends "shell.html" %}{% import "parts.html" as parts %}{% block body %}'
        "{{ parts.facts(pairs) }}{{ parts.table(columns, rows, caption, best) }}{% endblock %}"
    )
    environment = pages.templates(pages._TEMPLATES, escapes=True)
    html = environment.from_string(source).render(
        title="t", version="1", made="now", pairs=[("name", HOSTILE[0])], columns=["stack", "loss", "accuracy"],
        rows=[[HOSTILE[1], "1.5", "50%"], ["base", "2.0", "50%"]], caption=HOSTILE[2], best={(0, "loss")},
    )  # fmt: skip
    page = Page(html)
    page.check_self_contained()
    assert (page.texts("dt"), page.texts("dd")) == (["name"], [HOSTILE[0]])
    assert page.texts("th") == ["stack", "loss", "accuracy", HOSTILE[1], "base"]
    assert page.texts("td") == ["1.5", "50%", "2.0", "50%"]
    assert page.texts("td", "best") == ["1.5"]
    assert page.texts("caption") == [HOSTILE[2]]


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.name)
def test_every_page_stands_in_the_shell(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    if path.name not in ("shell.html", "parts.html", "plots.html"):
        assert source.startswith('{% extends "shell.html" %}')
    assert "http:" not in source and "https:" not in source and "<script" not in source


def test_a_page_has_a_place_before_anything_is_computed(tmp_path: Path) -> None:
    for fine in ("a.html", "a.HTM", "two words.html"):
        pages.check_page_place(tmp_path / fine)
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(Usage, match="not the name of a page") as wrong:
        pages.check_page_place(tmp_path / "page.pdf")
    assert "ends with .html" in str(wrong.value.hint)
    for place, kind, match in (
        ("folder.html", Usage, "is a folder"),
        ("none/a.html", NotFound, "does not exist"),
        ("file/a.html", Usage, "is a file"),
    ):
        with pytest.raises(kind, match=match):
            pages.check_page_place(tmp_path / place)
    with pytest.raises(StackctlError, match=r"not the name of a page; the folder .* does not exist"):
        pages.check_page_place(tmp_path / "none" / "page.pdf")
    assert not (tmp_path / "none").exists()


def test_a_folder_that_is_read_only_is_said_in_advance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path)  # tests may run as root, who may all
    with pytest.raises(StackctlError, match="nothing can be written"):
        pages.check_page_place(tmp_path / "a.html")


def test_a_page_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.html"
    pages.write_page(path, "first: 海 half \ud83d a pair, and \0")
    assert path.read_text(encoding="utf-8") == "first: 海 half ? a pair, and ?"

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        pages.write_page(path, "second")
    assert path.read_text(encoding="utf-8").startswith("first")
    assert [*tmp_path.iterdir()] == [path]
