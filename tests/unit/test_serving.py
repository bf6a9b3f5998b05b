"""``inspect --serve``: lines that can be typed as they are, or the reason why there are none."""

import shlex
from pathlib import Path

import msgspec
import pytest
from checkpoints import lora_config, lora_tensors, make_base, member, memory_checkpoint
from registry_fixtures import fails, filled_registry, four_adapters  # noqa: F401

from stackctl.cli import make_app
from stackctl.plan.build import plan_stack
from stackctl.plan.lint import TARGETS, VLLM_RANKS
from stackctl.registry.base_models import converted_folder
from stackctl.registry.resolve import ResolvedStack
from stackctl.serving.commands import TITLES, serve_commands

BASE = make_base()


def of_rank(*ranks, base=BASE, **config):
    members = [
        member(f"a{i}@1", checkpoint=memory_checkpoint(lora_config(r=rank, **config), lora_tensors(rank=rank)))
        for i, rank in enumerate(ranks)
    ]
    return plan_stack(base, members)


def recipes(plan, root, name="tale", **kind):
    return serve_commands(ResolvedStack(name, plan.base, (), name), plan, root, **kind)


def option(line, name):
    words = shlex.split(line)
    return words[words.index(name) + 1]


def test_every_target_has_a_recipe(tmp_path):
    assert list(recipes(of_rank(2), tmp_path)) == list(TITLES) == list(TARGETS)


@pytest.mark.parametrize(("ranks", "told"), [((1,), 1), ((2,), 8), ((16, 1), 32), ((64, 64), 128), ((300,), 320)])
def test_vllm_is_told_a_rank_that_it_has_and_that_is_enough(tmp_path, ranks, told):
    recipe = recipes(of_rank(*ranks), tmp_path)["vllm"]
    assert told in VLLM_RANKS
    assert option(recipe.lines[1], "--max-lora-rank") == str(told)
    assert recipe.problems == (), "a limit that the line heeds is none"


def test_what_is_exported_is_what_is_served(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tale-peft").mkdir()
    found = recipes(of_rank(2), tmp_path)
    out = option(found["vllm"].lines[0], "--out")
    assert out == "tale-peft-2", "an export needs a folder that is not there"
    assert option(found["vllm"].lines[1], "--lora-modules") == f"tale={out}"
    assert option(found["gguf"].lines[1], "--lora") == "tale-gguf/tale-gguf.gguf"
    assert option(found["ollama"].lines[1], "-f") == "tale-ollama/Modelfile"
    assert option(found["ollama"].lines[0], "--format") == "gguf"


def test_the_base_is_the_one_that_is_registered(tmp_path):
    change = msgspec.structs.replace
    hub = of_rank(2, base=change(BASE, kind="hub", source="org/name", revision="abc", path=None, dtype="bfloat16"))
    recipe = recipes(hub, tmp_path)
    assert shlex.split(recipe["vllm"].lines[1])[:3] == ["vllm", "serve", "org/name"]
    assert option(recipe["vllm"].lines[1], "--revision") == "abc"
    assert "--dtype" not in recipe["vllm"].lines[1]
    assert "convert_hf_to_gguf.py --remote org/name --outfile tiny.gguf" in recipe["gguf"].notes[0]
    assert option(recipe["gguf"].lines[1], "-m") == "tiny.gguf"

    folder = of_rank(2, base=change(BASE, source="../my model", path="../my model"))
    line = recipes(folder, tmp_path)["vllm"].lines[1]
    assert shlex.split(line)[2] == str(tmp_path.parent / "my model")
    assert option(line, "--dtype") == "float32", "vLLM would run it in half precision"

    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    gguf = of_rank(2, base=change(BASE, kind="gguf", source="m.gguf", path=None))
    recipe = recipes(gguf, tmp_path)
    assert option(recipe["gguf"].lines[1], "-m") == str(tmp_path / "m.gguf")
    assert shlex.split(recipe["vllm"].lines[1])[2] == str(converted_folder(tmp_path / "m.gguf"))
    assert "is not there" in recipe["vllm"].notes[1]


@pytest.mark.parametrize(
    ("plan", "target", "code"),
    [
        (of_rank(256, 257), "vllm", "vllm_rank"),
        (of_rank(2, use_dora=True), "gguf", "use_dora"),
        (of_rank(2, base=msgspec.structs.replace(BASE, architecture="Unheard")), "gguf", "gguf_architecture"),
        (of_rank(2, base=msgspec.structs.replace(BASE, architecture="Unheard")), "ollama", "ollama_architecture"),
        (plan_stack(BASE, [member("a@1", 0.0)]), "vllm", "nothing"),
    ],
)
def test_what_a_target_rejects_is_said_instead(tmp_path, plan, target, code):
    recipe = recipes(plan, tmp_path)[target]
    assert recipe.lines == ()
    assert code in [p.code for p in recipe.problems if p.severity == "error"]


def test_ollama_is_shown_with_its_warning(tmp_path):
    assert [p.code for p in recipes(of_rank(2), tmp_path)["ollama"].problems] == ["ollama_adapter"]


# -- the command -----------------------------------------------------------------------------------------------------


def exports(found):
    return [recipe["lines"][0] for recipe in found.values()]


def test_a_stack_by_its_name_and_an_expression_by_its_versions(run, filled_registry, tmp_path):  # noqa: F811
    run("compose", "style+instruct:0.5", "--name", "my.tale")
    stored = run("inspect", "my.tale", "--serve", "--json").json["serve"]
    assert [line.split()[:3] for line in exports(stored)] == [["stackctl", "export", "my.tale"]] * 3
    typed = run("inspect", "style+tone:-1", "--serve", "--json").json["serve"]
    assert {line.split()[2] for line in exports(typed)} == {"style@1+tone@1:-1"}
    assert "style-tone=style-tone-peft" in typed["vllm"]["lines"][1]
    alone = run("inspect", "style", "--serve", "--json").json
    assert alone["kind"] == "adapter"
    assert exports(alone["serve"])[0].startswith("stackctl export style@1 ")
    make_app("export")  # the options that the lines name are the command's own
    for line in exports(stored):
        run(*shlex.split(line)[1:], "--help")


def test_the_registry_is_named_where_it_has_to_be(run, filled_registry, tmp_path, monkeypatch):  # noqa: F811
    assert "--registry" not in run("inspect", "style", "--serve").out
    elsewhere = Path(filled_registry.root)
    (tmp_path / "away").mkdir()
    monkeypatch.chdir(tmp_path / "away")
    found = run("inspect", "style", "--serve", "--json", "--registry", elsewhere).json["serve"]
    assert {option(line, "--registry") for line in exports(found)} == {str(elsewhere)}


def test_lines_are_not_broken_for_a_person(run, filled_registry, monkeypatch):  # noqa: F811
    monkeypatch.setenv("COLUMNS", "60")
    shown = run("inspect", "style", "--serve").out.splitlines()
    assert "stackctl serve style@1" in [line.rstrip() for line in shown]
    lines = run("inspect", "style", "--serve", "--json").json["serve"]["vllm"]["lines"]
    assert len(lines[1]) > 60
    assert set(lines) <= {line.rstrip() for line in shown}


def test_what_cannot_be_served(fails, filled_registry, tmp_path):  # noqa: F811
    assert "what was asked about are adapters" in fails("inspect", "base", "--base", "tiny", "--serve", code=2)
    assert "stackctl add" in fails("inspect", "./somewhere", "--serve", code=2)
