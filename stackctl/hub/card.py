"""The model card of an adapter or a stack, from its entries alone, and the facts of one that stands in a repo.

Pure: the same entries give the same bytes.

The text is ``templates/card.md``; the metadata above it is huggingface_hub's ``ModelCardData``
(https://huggingface.co/docs/hub/model-cards#model-card-metadata).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stackctl.core.errors import StackctlError
from stackctl.core.expressions import format_sum, format_weight
from stackctl.core.hub_ids import parse_dataset_id
from stackctl.core.schema import CheckpointMember
from stackctl.hub.published import MEMBERS
from stackctl.plan.lint import vllm_max_rank
from stackctl.plan.methods import METHODS, SUM
from stackctl.registry.adapters import ResolvedMember
from stackctl.registry.base_models import EMBEDDED_HUB_ID
from stackctl.render.html import templates
from stackctl.render.loss_curve import PICTURE
from stackctl.storage.yaml_text import parse_yaml

CARD = "README.md"
_TEMPLATES = Path(__file__).with_name("templates")


@dataclass(frozen=True)
class CardFacts:
    """What a person knows and the registry does not; kept from the card that stands in the repo when not given."""

    license: str | None = None
    language: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()


@dataclass(frozen=True)
class Card:
    """Everything that a card says. One member and no stack: the card of an adapter, and what that was trained on.

    Members have their published entries; with ``has_members`` each lies in a folder of its own as well.
    """

    name: str
    repo: str
    base_id: str
    members: tuple[ResolvedMember, ...]
    rank: int
    is_stack: bool = False
    has_members: bool = False
    method: str = SUM
    foundations: tuple[CheckpointMember, ...] = ()
    facts: CardFacts = field(default_factory=CardFacts)
    has_picture: bool = False
    has_tokenizer: bool = False


def _python_name(adapter: str) -> str:
    """What PEFT calls an adapter: PyTorch refuses a dot in a module's name, and PEFT some words."""
    return "layer_" + adapter.replace(".", "_")


def render_card(card: Card) -> str:
    """The whole ``README.md``."""
    method = None if card.method == SUM else card.method
    terms = [(below.adapter, below.weight) for below in card.foundations]
    terms += [(member.adapter.name, member.weight) for member in card.members]
    template = templates(_TEMPLATES, escapes=False).get_template("card.md")  # Markdown, which the Hub makes safe
    return template.render(
        card=card,
        about=None if method is None else METHODS[method].about,
        newest=card.members[0],
        metadata=_metadata(card),
        base_link=f"[{card.base_id}](https://huggingface.co/{card.base_id})",
        names=" and ".join(f"**{member}**" for member in card.members),
        folder=MEMBERS,
        python_name=_python_name,
        format_weight=format_weight,
        diagram=_diagram(card),
        training=[row for member in card.members if (row := _training_row(member))],
        evaluation=[row for member in card.members if (row := _evaluation_row(member))],
        preferences=[row for member in card.members if (row := _preference_row(member))],
        picture=PICTURE,
        pulls=[*dict.fromkeys(f.repo for f in card.foundations if f.repo), card.repo],
        expression=_expression(card),
        file_name=card.name.replace("+", "-"),
        vllm_rank=vllm_max_rank(card.rank) or card.rank,
        formula=format_sum(terms, method),
    )


def _metadata(card: Card) -> str:
    from huggingface_hub import ModelCardData

    trained = [found[0] for m in card.members if m.version.data and (found := parse_dataset_id(m.version.data.path))]
    data = ModelCardData(
        base_model=card.base_id,
        base_model_relation="adapter",
        library_name="peft",
        pipeline_tag="text-generation",
        license=card.facts.license or None,
        datasets=list(dict.fromkeys([*card.facts.datasets, *trained])) or None,
        language=list(card.facts.language) or None,
        tags=["lora", "peft", "stackctl", *(["adapter-stack"] if card.is_stack else [])],
    )
    return str(data.to_yaml(line_break="\n"))


def _diagram(card: Card) -> str:
    """The stack as a person would draw it: the base below, the newest adapter on top."""
    terms = [(str(f), "frozen while the one above was trained") for f in card.foundations]
    terms += [(str(m), f"rank {m.version.lora.r}, {m.version.parameters:,} parameters") for m in card.members]
    column = max(len(term) for term, _ in terms)
    rows = [f"+ {term:<{column}}  {what}" for term, what in reversed(terms)]
    width = max(len(row) for row in [*rows, card.base_id])
    edge = f"+-{'-' * width}-+"
    return "\n".join([edge, *(f"| {row:<{width}} |" for row in rows), edge, f"| {card.base_id:<{width}} |", edge])


def _training_row(member: ResolvedMember) -> list[str] | None:
    version = member.version
    data, run = version.data, version.run
    if run is None and data is None:
        return None
    source = f"{data.path} (`sha256:{data.sha256.removeprefix('sha256:')[:12]}…`)" if data else "?"
    rate = (version.settings or {}).get("learning_rate", "?")
    cells = [f"`{member.label}`", "+".join(version.trained_on) or "the base alone", source]
    cells += [f"{data.records:,}" if data else "?", *((f"{run.steps:,}", f"{run.tokens:,}") if run else ("?", "?"))]
    cells += [f"{rate:g}" if isinstance(rate, float) else str(rate), f"{run.loss:.4g}" if run else "?"]
    return [cell.replace("|", "\\|") for cell in cells]


def _evaluation_row(member: ResolvedMember) -> list[str] | None:
    run: Any = member.version.run
    if run is None or run.eval_loss is None or run.margin is not None or member.version.distilled:
        return None
    return [f"`{member.label}`", f"{run.eval_loss:.4g}", f"{math.exp(min(run.eval_loss, 700)):.4g}"]


def _preference_row(member: ResolvedMember) -> list[str] | None:
    """What a run on answers came to: how many it ranked rightly while it learned, and of held-out ones."""
    run, settings = member.version.run, member.version.settings or {}
    if run is None or run.accuracy is None or run.margin is None:
        return None
    cells = [f"`{member.label}`", str(settings.get("objective", "?")), f"{run.accuracy:.1%}", f"{run.margin:.4g}"]
    if run.eval_accuracy is None or run.eval_margin is None:
        return [*cells, "", ""]
    return [*cells, f"{run.eval_accuracy:.1%}", f"{run.eval_margin:.4g}"]


def _expression(card: Card) -> str:
    if card.is_stack:  # without its members a pull brings their sum, as one adapter, whose name holds no '+'
        return card.name if card.has_members else card.name.replace("+", "-")
    return "+".join([*map(str, card.foundations), card.members[0].label])


_KNOWN_FACTS = {EMBEDDED_HUB_ID: CardFacts(license="apache-2.0", language=("en",))}


def facts_of_card(text: str) -> CardFacts:
    """License, languages and data sets of a card that stands in a repo; nothing where it cannot be read."""
    match = re.match(r"---\s*\n(.*?\n)---\s*(?:\n|$)", text.removeprefix("\ufeff").replace("\r\n", "\n"), re.DOTALL)
    try:
        values = parse_yaml(match[1], CARD).value if match else {}
    except StackctlError:
        return CardFacts()
    if not isinstance(values, dict):
        return CardFacts()
    found = values.get("license")
    return CardFacts(
        found if isinstance(found, str) else None, _texts(values.get("language")), _texts(values.get("datasets"))
    )


def _texts(value: Any) -> tuple[str, ...]:
    values = value if isinstance(value, list) else [value]
    return tuple(item for item in values if isinstance(item, str))


def combine_facts(asked: CardFacts, standing: CardFacts, base_id: str) -> CardFacts:
    """What was asked for now, else what stands in the repo, else what is known of the base."""
    known = _KNOWN_FACTS.get(base_id, CardFacts())
    return CardFacts(
        asked.license or standing.license or known.license,
        asked.language or standing.language or known.language,
        asked.datasets or standing.datasets,
    )
