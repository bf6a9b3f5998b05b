"""The model card of an adapter or a stack, from its entries alone. Pure: the same entries give the same bytes.

Front matter: https://huggingface.co/docs/hub/model-cards#model-card-metadata
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field

from stackctl.core.expressions import format_sum, format_term, format_weight
from stackctl.core.hub_ids import parse_dataset_id
from stackctl.core.schema import AdapterVersion
from stackctl.plan.lint import vllm_max_rank
from stackctl.render.loss_curve import PICTURE

CARD = "README.md"
# Words that YAML 1.1 (PyYAML, so huggingface_hub) and YAML 1.2 (the Hub) read differently: Norwegian is one.
_AMBIGUOUS = {"y", "n", "yes", "no", "on", "off", "true", "false", "null", "none"}


@dataclass(frozen=True)
class CardFacts:
    """What a person knows and the registry does not; kept from the card that stands in the repo when not given."""

    license: str | None = None
    language: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()


@dataclass(frozen=True)
class CardMember:
    """One adapter version with its weight, as the card tells of it. ``folder`` is where it lies in the repo."""

    name: str
    version: AdapterVersion
    weight: float = 1.0
    description: str = ""
    folder: str | None = None

    @property
    def label(self) -> str:
        return f"{self.name}@{self.version.version}"


@dataclass(frozen=True)
class TrainedOn:
    """An adapter that the card's adapter was trained on. ``repo`` is where it lives, when that is known."""

    name: str
    version: int
    weight: float
    digest: str = ""
    repo: str | None = None

    @property
    def label(self) -> str:
        return f"{self.name}@{self.version}"


@dataclass(frozen=True)
class Card:
    """Everything that a card says. One member and no stack: the card of an adapter."""

    name: str
    repo: str
    base_id: str
    members: tuple[CardMember, ...]
    rank: int
    is_stack: bool = False
    foundations: tuple[TrainedOn, ...] = ()
    facts: CardFacts = field(default_factory=CardFacts)
    has_picture: bool = False
    has_tokenizer: bool = False
    has_chat_template: bool = False


def render_card(card: Card) -> str:
    """The whole ``README.md``."""
    sections = [_front_matter(card), _what(card), _diagram(card), _training(card), _evaluation(card), _usage(card)]
    return "\n\n".join([*(section for section in sections if section), _formula(card)]) + "\n"


# -- front matter ---------------------------------------------------------------------------------------------------


def _front_matter(card: Card) -> str:
    lines = [
        f"base_model: {_word(card.base_id)}",
        "base_model_relation: adapter",
        "library_name: peft",
        "pipeline_tag: text-generation",
        *([f"license: {_word(card.facts.license)}"] if card.facts.license else []),
        *_listed("datasets", _datasets(card)),
        *_listed("language", card.facts.language),
        *_listed("tags", ("lora", "peft", "stackctl", *(("adapter-stack",) if card.is_stack else ()))),
    ]
    return "\n".join(["---", *lines, "---"])


def _listed(key: str, values: tuple[str, ...]) -> list[str]:
    return [f"{key}:", *(f"- {_word(value)}" for value in values)] if values else []


def _word(text: str) -> str:
    """A text as a YAML scalar that every version of YAML reads as that text."""
    plain = re.fullmatch(r"[A-Za-z][\w./-]*", text) and text.lower() not in _AMBIGUOUS
    return text if plain else json.dumps(text, ensure_ascii=False)


def _datasets(card: Card) -> tuple[str, ...]:
    """The data sets on the Hub: those that were given, and those that training read from there."""
    trained = [found[0] for m in card.members if m.version.data and (found := parse_dataset_id(m.version.data.path))]
    return tuple(dict.fromkeys([*card.facts.datasets, *trained]))


# -- what it is -----------------------------------------------------------------------------------------------------


def _what(card: Card) -> str:
    base = f"[{card.base_id}](https://huggingface.co/{card.base_id})"
    if card.is_stack:
        names = " and ".join(f"**{_term(m)}**" for m in card.members)
        text = (
            f"A stack of {len(card.members)} LoRA adapters on {base}, {names}, made with stackctl. "
            f"The adapter at the root of this repo is their exact sum (rank {card.rank}): plain PEFT loads it as one."
        )
        where = [f"- `{_term(m)}`{_colon(m.description)}{_in_folder(m)}" for m in card.members]
        return "\n".join([f"# {card.name}", "", text, "", *where])
    member = card.members[0]
    text = f"A LoRA adapter (rank {card.rank}) for {base}, made with stackctl: `{member.label}`."
    lines = [f"# {card.name}", "", *([member.description, ""] if member.description else []), text]
    if card.foundations:
        lines += ["", _needs(card)]
    return "\n".join(lines)


def _term(member: CardMember) -> str:
    return format_term(member.label, member.weight)


def _colon(text: str) -> str:
    return f": {text}" if text else ""


def _in_folder(member: CardMember) -> str:
    return f" (by itself in `{member.folder}/`)" if member.folder else ""


def _needs(card: Card) -> str:
    """That the adapter needs others, which, and where they live."""
    lines = ["**It needs what it was trained on**: used without, it is not the model that was trained."]
    for foundation in card.foundations:
        where = (
            f"[{foundation.repo}](https://huggingface.co/{foundation.repo})"
            if foundation.repo
            else "ask its author: it was not on the Hub when this was pushed"
        )
        digest = f" (`{foundation.digest[:19]}…`)" if foundation.digest else ""
        lines.append(f"- `{format_term(foundation.label, foundation.weight)}`{digest}: {where}")
    return "\n\n".join([lines[0], "\n".join(lines[1:])])


def _diagram(card: Card) -> str:
    """The stack as a person would draw it: the base below, the newest adapter on top."""
    terms = [(format_term(f.label, f.weight), "frozen while the one above was trained") for f in card.foundations]
    terms += [(_term(m), f"rank {m.version.lora.r}, {m.version.parameters:,} parameters") for m in card.members]
    column = max(len(term) for term, _ in terms)
    rows = [f"+ {term:<{column}}  {what}" for term, what in reversed(terms)]
    width = max(len(row) for row in [*rows, card.base_id])
    edge = f"+-{'-' * width}-+"
    boxed = [edge, *(f"| {row:<{width}} |" for row in rows), edge, f"| {card.base_id:<{width}} |", edge]
    return _code("text", boxed)


# -- how it was made ------------------------------------------------------------------------------------------------


def _training(card: Card) -> str:
    rows = [row for member in card.members if (row := _training_row(member))]
    if not rows:
        return ""
    lines = [
        "## Training",
        "",
        "| adapter | trained on | data | records | steps | tokens | learning rate | loss |",
        "|---|---|---|---|---|---|---|---|",
        *rows,
    ]
    if card.has_picture:
        lines += ["", f"![training loss by step]({PICTURE})"]
    return "\n".join(lines)


def _training_row(member: CardMember) -> str | None:
    version = member.version
    if version.run is None and version.data is None:
        return None
    data = f"{version.data.path} (`sha256:{_hex(version.data.sha256)[:12]}…`)" if version.data else "?"
    records = f"{version.data.records:,}" if version.data else "?"
    run = version.run
    numbers = [f"{run.steps:,}", f"{run.tokens:,}"] if run else ["?", "?"]
    rate = (version.settings or {}).get("learning_rate", "?")
    loss = f"{run.loss:.4g}" if run else "?"
    on = "+".join(version.trained_on) or "the base alone"
    cells = [f"`{member.label}`", on, data, records, *numbers, f"{rate:g}" if isinstance(rate, float) else str(rate)]
    return "| " + " | ".join([*(cell.replace("|", "\\|") for cell in cells), loss]) + " |"


def _hex(digest: str) -> str:
    return digest.removeprefix("sha256:")


def _evaluation(card: Card) -> str:
    rows = [
        f"| `{m.label}` | {m.version.run.eval_loss:.4g} | {math.exp(min(m.version.run.eval_loss, 700)):.4g} |"
        for m in card.members
        if m.version.run and m.version.run.eval_loss is not None
    ]
    if not rows:
        return ""
    head = ["| adapter | loss on held-out data | perplexity |", "|---|---|---|"]
    return "\n".join(["## Evaluation", "", *head, *rows])


# -- how to use it --------------------------------------------------------------------------------------------------


def _usage(card: Card) -> str:
    tokenizer = card.repo if card.has_tokenizer else card.base_id
    return "\n\n".join(
        [
            "## Use",
            "With stackctl (`pip install stackctl-lora`):",
            _code("bash", _stackctl_lines(card)),
            "With plain PEFT:",
            _code("python", _peft_lines(card, tokenizer)),
            "With vLLM:" if not card.foundations else "With vLLM, after making one adapter of all:",
            _code("bash", _vllm_lines(card)),
        ]
    )


def _code(language: str, lines: list[str]) -> str:
    return "\n".join([f"```{language}", *lines, "```"])


def _expression(card: Card) -> str:
    if card.is_stack:  # without its members a pull brings their sum, as one adapter, whose name holds no '+'
        return card.name if any(m.folder for m in card.members) else card.name.replace("+", "-")
    return "+".join([*(format_term(f.label, f.weight) for f in card.foundations), card.members[0].label])


def _stackctl_lines(card: Card) -> list[str]:
    repos = dict.fromkeys(f.repo for f in card.foundations if f.repo)
    pulls = [f"stackctl pull {repo}" for repo in [*repos, card.repo]]
    return [*pulls, f'stackctl generate {_expression(card)} -p "Tell me about the sea."']


def _peft_lines(card: Card, tokenizer: str) -> list[str]:
    lines = [
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'base = AutoModelForCausalLM.from_pretrained("{card.base_id}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{tokenizer}")',
    ]
    if not card.foundations:
        return [*lines, f'model = PeftModel.from_pretrained(base, "{card.repo}")']
    names = [f.name for f in card.foundations] + [card.members[0].name]
    places = [f.repo or f"path/to/{f.name}" for f in card.foundations] + [card.repo]
    lines.append(f'model = PeftModel.from_pretrained(base, "{places[0]}", adapter_name="layer_{_python(names[0])}")')
    for name, place in zip(names[1:], places[1:], strict=True):
        lines.append(f'model.load_adapter("{place}", adapter_name="layer_{_python(name)}")')
    active = ", ".join(f'"layer_{_python(name)}"' for name in names)
    lines.append(f"model.base_model.set_adapter([{active}])  # all of them at once")
    for foundation in card.foundations:
        if foundation.weight != 1:
            name, weight = _python(foundation.name), format_weight(foundation.weight)
            lines += [
                "for module in model.modules():",
                '    if hasattr(module, "set_scale"):',
                f'        module.set_scale("layer_{name}", {weight})',
            ]
    return lines


def _python(name: str) -> str:
    """A name without the characters that PyTorch refuses in a module's name."""
    return name.replace(".", "_")


def _vllm_lines(card: Card) -> list[str]:
    name = card.name.replace("+", "-")
    if not card.foundations:
        return [_vllm(card.base_id, vllm_max_rank(card.rank) or card.rank, name, card.repo)]
    place = f"./{name}-peft"
    return [
        f"stackctl export {_expression(card)} --format peft --out {place}  # says the rank, for the next line",
        _vllm(card.base_id, 128, name, place),
    ]


def _vllm(base: str, rank: int, name: str, place: str) -> str:
    return f"vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules {name}={place}"


def _formula(card: Card) -> str:
    lines = [
        "## What it computes",
        "",
        "```text",
        format_sum([(f.name, f.weight) for f in card.foundations] + [(m.name, m.weight) for m in card.members]),
        "ΔW = scaling · B @ A,  scaling = alpha / rank  (alpha / √rank with rsLoRA)",
        "```",
    ]
    if card.is_stack:
        lines += ["", "The members, their versions, digests and weights are pinned in `stack.yaml`."]
    return "\n".join(lines)
