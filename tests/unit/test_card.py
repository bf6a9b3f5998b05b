"""The model card: what it says, and that others can read it."""

from __future__ import annotations

import ast

import pytest
import yaml

from stackctl.core.provenance import DataSource, Run
from stackctl.core.schema import Adapter, AdapterVersion, CheckpointMember, Lora
from stackctl.hub.bundle import is_ours
from stackctl.hub.card import Card, CardFacts, combine_facts, facts_of_card, render_card
from stackctl.registry.adapters import ResolvedMember


def version(number: int = 1, rank: int = 16, data: str | None = "chat.jsonl", **changes: object) -> AdapterVersion:
    source = DataSource(path=data, sha256="sha256:" + "ab" * 32, records=200, format="messages") if data else None
    run = Run(
        steps=150, epochs=3, loss=1.2345, tokens=9000, supervised_tokens=4000, seconds=3.5, frozen="fold", eval_loss=2.0
    )
    fields = {"data": source, "run": run, "settings": {"learning_rate": 2e-4}, **changes}
    return AdapterVersion(
        version=number, digest="sha256:" + "1" * 64, path=".", base="tiny", fingerprint="sha256:" + "f" * 64,
        created="2026-01-31T12:00:00Z", lora=Lora(r=rank, lora_alpha=32), parameters=4884480, dtype="float32", **fields,
    )  # fmt: skip


def member(name: str, entry: AdapterVersion, weight: float = 1.0, description: str = "") -> ResolvedMember:
    return ResolvedMember(Adapter(name=name, description=description, versions=[entry]), entry, weight)


def below(name: str, number: int, weight: float = 1.0, digest: str = "", repo: str | None = None) -> CheckpointMember:
    return CheckpointMember(adapter=name, version=number, weight=weight, digest=digest, repo=repo)


def adapter_card(**changes: object) -> Card:
    one = member("instruct", version(2, trained_on=["style@1:0.5"]), description="follows instructions")
    fields = {"name": "instruct", "repo": "me/instruct", "base_id": "acme/tiny", "members": (one,), "rank": 16}
    return Card(**{**fields, **changes})  # type: ignore[arg-type]


def stack_card(**changes: object) -> Card:
    members = (member("style", version(1, 8), 0.5), member("instruct", version(2)))
    fields = {"name": "teller", "repo": "me/teller", "base_id": "acme/tiny", "members": members, "rank": 24}
    return Card(**{**fields, "is_stack": True, **changes})  # type: ignore[arg-type]


def front_matter(text: str) -> dict[str, object]:
    head, matter, _ = text.split("---\n", 2)
    assert head == ""
    loaded = yaml.safe_load(matter)
    assert isinstance(loaded, dict)
    return loaded


def code(text: str, language: str) -> list[str]:
    return [block.partition("\n```")[0] for block in text.split(f"```{language}\n")[1:]]


def test_the_front_matter_is_what_the_hub_wants() -> None:
    card = adapter_card(facts=CardFacts("apache-2.0", ("en", "zh"), ("acme/chats",)))
    assert front_matter(render_card(card)) == {
        "base_model": "acme/tiny",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "license": "apache-2.0",
        "datasets": ["acme/chats"],
        "language": ["en", "zh"],
        "tags": ["lora", "peft", "stackctl"],
    }


def test_what_nobody_knows_is_left_out() -> None:
    assert not {"license", "datasets", "language"} & set(front_matter(render_card(adapter_card())))


@pytest.mark.parametrize("word", ["no", "on", "true", "1e5", "0755", "a: b", "- x", '"', "null", "~", "ja\n- en"])
def test_every_word_reads_back_as_text(word: str) -> None:
    """Norwegian is the language ``no``, which PyYAML reads as false."""
    assert front_matter(render_card(adapter_card(facts=CardFacts(word, (word,)))))["language"] == [word]


def test_huggingface_hub_reads_the_card() -> None:
    from huggingface_hub import ModelCard

    data = ModelCard(render_card(adapter_card(facts=CardFacts("mit", ("no",))))).data
    assert (data.base_model, data.license, data.language) == ("acme/tiny", "mit", ["no"])


def test_a_data_set_on_the_hub_is_named_and_a_file_is_not() -> None:
    from_hub = adapter_card(members=(member("a", version(data="acme/chats")),))
    assert front_matter(render_card(from_hub))["datasets"] == ["acme/chats"]
    from_file = adapter_card(members=(member("a", version(data="examples/chat.jsonl")),))
    assert "datasets" not in front_matter(render_card(from_file))


def test_the_same_entries_give_the_same_bytes() -> None:
    assert render_card(stack_card()) == render_card(stack_card())


def test_a_stack_says_its_sum_and_loads_as_one_adapter() -> None:
    text = render_card(stack_card())
    assert "W = W_base + 0.5·ΔW_style + ΔW_instruct" in text
    assert "--max-lora-rank 32 " in text  # vLLM knows only some ranks; 24 needs 32
    (python,) = code(text, "python")
    assert 'PeftModel.from_pretrained(base, "me/teller")' in python
    assert front_matter(text)["tags"] == ["lora", "peft", "stackctl", "adapter-stack"]


def test_a_negative_weight_is_subtracted() -> None:
    card = stack_card(members=(member("style", version(), -1), member("x", version(), -0.5)))
    assert "W = W_base - ΔW_style - 0.5·ΔW_x" in render_card(card)


def test_an_adapter_that_stands_on_another_says_so_and_where_that_lives() -> None:
    foundation = below("style", 1, 0.5, "sha256:" + "c" * 64, "me/style")
    text = render_card(adapter_card(foundations=(foundation,)))
    assert "`style@1:0.5`" in text and "https://huggingface.co/me/style" in text
    assert code(text, "bash")[0].splitlines()[:2] == ["stackctl pull me/style", "stackctl pull me/instruct"]
    assert "W = W_base + 0.5·ΔW_style + ΔW_instruct" in text
    unknown = render_card(adapter_card(foundations=(below("style", 1, 1.0),)))
    assert "stackctl pull me/style" not in unknown and "ask its author" in unknown


@pytest.mark.parametrize("foundations", [(), (below("st.yle", 1, 0.5, "", "me/style"), below("b", 2, 1.0))])
def test_the_python_in_the_card_is_python(foundations: tuple[CheckpointMember, ...]) -> None:
    (python,) = code(render_card(adapter_card(foundations=foundations)), "python")
    ast.parse(python)


def test_the_diagram_is_a_box() -> None:
    (box,) = code(render_card(stack_card(base_id="a/" + "b" * 90)), "text")[:1]
    lines = box.splitlines()
    assert len({len(line) for line in lines}) == 1
    assert [line[2] for line in lines[1:3]] == ["+", "+"] and "instruct@2" in lines[1] and "style@1:0.5" in lines[2]


def test_training_and_evaluation_are_numbers_of_the_run() -> None:
    text = render_card(adapter_card(has_picture=True))
    row = next(line for line in text.splitlines() if line.startswith("| `instruct@2` | style"))
    assert [cell.strip() for cell in row.strip("|").split("|")] == [
        "`instruct@2`", "style@1:0.5", "chat.jsonl (`sha256:abababababab…`)", "200", "150", "9,000", "0.0002", "1.234",
    ]  # fmt: skip
    assert "| `instruct@2` | 2 | 7.389 |" in text
    assert "](training_loss.svg)" in text


def test_a_run_on_answers_has_no_perplexity_but_says_how_it_ranks() -> None:
    run = Run(
        steps=9, epochs=1, loss=0.5, tokens=900, supervised_tokens=400, seconds=1, frozen="fold", eval_loss=0.4,
        accuracy=0.75, margin=0.3, eval_accuracy=0.875, eval_margin=0.25,
    )  # fmt: skip
    one = member("taste", version(run=run, settings={"objective": "dpo", "learning_rate": 1e-3}))
    text = render_card(adapter_card(members=(one,)))
    assert "## Evaluation" not in text
    assert "| `taste@1` | dpo | 75.0% | 0.3 | 87.5% | 0.25 |" in text


def test_an_adapter_made_elsewhere_has_no_training_to_tell() -> None:
    text = render_card(adapter_card(members=(member("a", version(data=None, run=None, settings=None)),)))
    assert "## Training" not in text and "## Evaluation" not in text


def test_facts_that_stand_in_a_repo_are_kept_until_others_are_given() -> None:
    standing = facts_of_card(render_card(adapter_card(facts=CardFacts("mit", ("de",), ("a/b",)))))
    assert standing == CardFacts("mit", ("de",), ("a/b",))
    assert combine_facts(CardFacts(language=("en",)), standing, "acme/tiny") == CardFacts("mit", ("en",), ("a/b",))
    known = combine_facts(CardFacts(), CardFacts(), "HuggingFaceTB/SmolLM2-135M-Instruct")
    assert known == CardFacts("apache-2.0", ("en",))


@pytest.mark.parametrize(
    "text", ["", "no front matter", "---\n- a list\n---\n", "---\na: &b 1\n---\n", "---\nnever ends"]
)
def test_a_card_that_cannot_be_read_says_nothing(text: str) -> None:
    assert facts_of_card(text) == CardFacts()


def test_only_files_that_a_push_writes_may_be_removed_by_one() -> None:
    assert is_ours("members/style/adapter_model.safetensors") and is_ours("stack.yaml")
    assert not is_ours("notes.md") and not is_ours("members/style/deep/file") and not is_ours(".gitattributes")
