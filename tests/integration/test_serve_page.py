"""The page of ``stackctl serve`` in headless Chromium, with a real server behind it and no other network."""

from __future__ import annotations

import json

import pytest
from browser import browsing
from serving import serving

pytestmark = pytest.mark.browser
DONE = "document.getElementById('mixes').getAttribute('aria-busy') === 'false'"
SHOWN = "[...document.querySelectorAll('.mix')].map(mix => mix.querySelector('.answer').textContent)"
COMMANDS = "[...document.querySelectorAll('.mix code')].map(code => code.textContent)"


def two_mixes(tab, server):
    tab.look()
    tab.open(f"{server.url}/")
    tab.until("document.querySelectorAll('.mix').length === 2")


def chosen(tab):
    """What has the keyboard: its label, or its text."""
    return tab.run(
        "(at => at.getAttribute('aria-label') || (at.labels?.[0] || at).textContent.trim())(document.activeElement)"
    )


@pytest.fixture
def filled_registry(tiny_registry):
    made = tiny_registry("llama")
    made.loss = made.train("style", "--max-steps", 1)["loss"]
    made.add("tone", seed=2, r=3)
    made.run("compose", "style+tone:0.5", "--name", "both")
    return made


def test_the_page_mixes_and_compares(filled_registry, run, tmp_path):
    with serving(filled_registry.folder) as server, browsing(tmp_path) as tab:
        two_mixes(tab, server)
        assert tab.run(COMMANDS) == ["stackctl use both", "stackctl generate base"]
        sliders = "[...document.querySelectorAll('.mix input[type=range]')].map(slider => slider.valueAsNumber)"
        assert tab.run(sliders) == [1, 0.5]
        assert f"loss {filled_registry.loss:.2f}" in tab.run("document.querySelector('.slider').textContent")
        tab.run("document.getElementById('tokens').value = 20")
        tab.run("document.getElementById('prompt').focus()")
        tab.press("Enter", ctrl=True)
        tab.until(f"{DONE} && document.querySelector('.answer').textContent")
        prompt = tab.run("document.getElementById('prompt').value")

        def known(what):
            return run("generate", what, "-p", prompt, "--max-new-tokens", 20, "--json").json["text"]

        assert tab.run(SHOWN) == [known("both"), known("base")]
        assert tab.run("document.querySelectorAll('.mix:first-child mark').length") == 0
        marked = tab.run("[...document.querySelectorAll('.mix:nth-child(2) mark')].map(mark => mark.textContent)")
        assert marked
        # A third mix, by the keyboard: one adapter, its weight moved by two steps of its slider.
        tab.run("document.getElementById('add').focus()")
        tab.press("Enter")
        assert chosen(tab) == "Start from"
        assert len(tab.run(COMMANDS)) == 3
        tab.press("ArrowDown")
        assert tab.run(COMMANDS)[2] == "stackctl generate style"
        while chosen(tab) != "weight of style@1":
            tab.press("Tab")
        tab.press("ArrowRight")
        tab.press("ArrowRight")
        assert tab.run(COMMANDS) == [
            "stackctl use both",
            "stackctl generate base",
            "stackctl compose style@1:1.1 --name style-mix",
        ]
        while chosen(tab) != "Answer":
            tab.press("Tab", shift=True)
        tab.press("Enter")
        tab.until(f"{DONE} && document.querySelectorAll('.answer')[2].textContent")
        assert tab.run(SHOWN)[2] == known("style@1:1.1")
        assert run(*tab.run(COMMANDS)[2].split()[1:], "--json").json["members"][0]["weight"] == 1.1
        assert not tab.errors and all(address.startswith(server.url) for address in tab.requests)
        wide = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        for width in (320, 768, 1280):
            tab.look(width=width, dark=width == 768)
            assert tab.run(wide) <= 0, f"nothing is cut off at {width}"


def test_the_page_says_what_is_wrong_and_asks_for_a_key(filled_registry, tmp_path):
    with serving(filled_registry.folder, "--api-key", "secret") as server, browsing(tmp_path) as tab:
        tab.open(f"{server.url}/")
        tab.until("!document.getElementById('keybox').hidden")
        tab.errors.clear()  # the browser logs the answer 401
        tab.run("document.getElementById('key').focus()")
        tab.write("secret")
        tab.press("Tab")
        tab.until("document.querySelectorAll('.mix').length === 2")
        filled_registry.run("rm", "both")
        tab.run("document.getElementById('tokens').value = 4")
        tab.run("document.getElementById('ask').requestSubmit()")
        told = tab.until(f"{DONE} && document.querySelector('.mix .facts.wrong')?.textContent")
        assert "both" in told, json.dumps(told)
        tab.until("document.querySelectorAll('.answer')[1].textContent")
