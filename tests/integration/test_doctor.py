"""``stackctl doctor`` says what is here, and nothing that is secret."""

from __future__ import annotations

import importlib.metadata
from typing import Any


def test_it_says_what_this_machine_can_do(run: Any, registry: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_ATokenThatNobodyMaySee")
    ran = run("doctor", "--json")
    found = ran.json
    assert found["problems"] == []
    assert found["packages"]["torch"] == importlib.metadata.version("torch")
    assert found["devices"][-1]["type"] == "cpu"
    assert found["registry"] == {"path": str(registry), "adapters": 0, "stacks": 0, "bases": 1}
    assert found["hub"]["token"] is True
    assert [row["base"] for row in found["sizes"]][:2] == ["135M", "1B"]
    for row in found["sizes"]:
        for work in ("generate", "train"):
            assert row[work]["fits"] == (row[work]["bytes"] <= found["devices"][0]["free"])
    assert "hf_A" not in ran.out + ran.err
    shown = run("doctor").out
    assert "size of base" in shown
    assert "hf_A" not in shown


def test_it_needs_no_registry(run: Any) -> None:
    assert run("doctor", "--json").json["registry"] is None
    assert "stackctl init" in run("doctor").out


def test_a_missing_package_is_exit_code_1(run: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(
        "stackctl.machine.resources.packages", lambda: ({"torch": None}, ["torch>=2.6 is needed, and is missing"])
    )
    ran = run("doctor", "--json", code=1)
    assert [p["message"] for p in ran.json["problems"]] == ["torch>=2.6 is needed, and is missing"]
    assert ran.json["devices"] == ran.json["sizes"] == []
