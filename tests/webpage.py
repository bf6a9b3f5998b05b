"""An HTML page as a browser would take it apart, to ask what is in it."""

from __future__ import annotations

import re
from html.parser import HTMLParser

VOID = {"meta", "link", "br", "img", "input", "hr", "base"}
_LOADS = {"src", "href", "srcset", "data", "action", "formaction", "poster", "background", "xlink:href", "ping"}


class Page(HTMLParser):
    """``elements`` are (tag, attributes, text inside), in the order in which they begin."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.html = html
        self.elements: list[tuple[str, dict[str, str], list[str]]] = []
        self._open: list[tuple[str, list[str]]] = []
        self.feed(html)
        self.close()
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        text: list[str] = []
        self.elements.append((tag, {key: value or "" for key, value in attrs}, text))
        if tag not in VOID:
            self._open.append((tag, text))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}, []))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            opened, _ = self._open.pop()
            assert opened == tag, f"<{opened}> is closed by </{tag}>"

    def handle_data(self, data: str) -> None:
        for _, text in self._open:
            text.append(data)

    def texts(self, tag: str, css_class: str | None = None) -> list[str]:
        """The text of each element of a kind, and of a class where one is asked for."""
        return [
            "".join(text)
            for found, attributes, text in self.elements
            if found == tag and (css_class is None or css_class in attributes.get("class", "").split())
        ]

    def check_self_contained(self) -> None:
        """Nothing is run, nothing is loaded, and the policy that forbids both stands before anything else could."""
        tags = [tag for tag, _, _ in self.elements]
        assert not {"script", "iframe", "object", "embed", "link", "base", "form"} & set(tags)
        for tag, attributes, _ in self.elements:
            assert not {key for key in attributes if key.startswith("on")}, (tag, attributes)
            loaded = {key: value for key, value in attributes.items() if key in _LOADS}
            assert all(value.startswith(("#", "data:image/")) for value in loaded.values()), (tag, loaded)
        styles = " ".join([*self.texts("style"), *(a.get("style", "") for _, a, _ in self.elements)])
        assert not re.search(r"url\s*\(|@import|expression\s*\(", styles)
        (policy,) = [a["content"] for _, a, _ in self.elements if a.get("http-equiv") == "Content-Security-Policy"]
        rules = dict(rule.strip().partition(" ")[::2] for rule in policy.split(";"))
        assert rules["default-src"] == "'none'"
        assert set(rules) <= {"default-src", "style-src", "img-src", "base-uri", "form-action"}
        assert tags.index("meta") < tags.index("title") < tags.index("style")
