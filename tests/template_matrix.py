"""Every chat template that TRL ships, times conversations of every shape: what becomes of each.

``python tests/template_matrix.py`` writes the counts into docs/reference/chat-templates.md.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

import trl  # noqa: E402
from conversation_shapes import SHAPES  # noqa: E402
from template_oracle import NAMES, Case, Oracle  # noqa: E402

from stackctl.core.errors import Usage  # noqa: E402
from stackctl.engine.data.encoding import encode  # noqa: E402
from stackctl.engine.data.examples import IGNORED, EncodeOptions, Example  # noqa: E402
from stackctl.engine.records.read import read_records  # noqa: E402

PAGE = ROOT / "docs" / "reference" / "chat-templates.md"
VERDICTS = ("right", "said", "refused")
_HEAD = """\
# Chat templates

What becomes of conversations of {shapes} shapes under the {templates} chat templates that TRL {version} ships: for
each turn of the assistant, is it exactly what the model has to write behind the generation prompt of that moment? The
judge renders with transformers alone. Written by `python tests/template_matrix.py`, and held by the tests.

- right: every turn is learned whole, up to its end of turn, and nothing else.
- said: the template drops something of the conversation (tools, a text beside a call), and a note counts it.
- refused: an error with the line: the template refuses it, or shows nothing of what is to be learned, or the answer
  is empty.

Of the {meaningful} cells (of {cells}) in which the template can show everything, {right} are right ({share:.1%});
none is wrong without a word.

The shapes:

{names}

| template | right | said | refused |
| --- | --: | --: | --: |
"""


def _turns(tokenizer: Any, example: Example) -> list[tuple[str, str]]:
    """Each run of supervised tokens as text, behind the text before it."""
    found, ids = [], example.input_ids
    learned = [label != IGNORED for label in example.labels]
    start = None
    for position, on in enumerate([*learned, False]):
        if on and start is None:
            start = position
        elif not on and start is not None:
            before, written = (
                tokenizer.decode(part, clean_up_tokenization_spaces=False)
                for part in (ids[:start], ids[start:position])
            )
            found.append((before, written))
            start = None
    return found


def verdict(oracle: Oracle, shape: str) -> tuple[str, bool, list[str]]:
    """What becomes of one cell, whether the template can show all of it, and what is wrong where something is."""
    case: Case = SHAPES[shape]
    meaningful = all(turn.answer or turn.calls for turn in case.wanted) and oracle.can(case)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "record.jsonl")
        path.write_text(json.dumps(case.record) + "\n")
        try:
            encoded = encode(read_records(path), oracle.tokenizer, EncodeOptions(100_000))
        except Usage as error:
            return "refused", meaningful, [error.message]
    found = [turn for example in encoded.examples for turn in _turns(oracle.tokenizer, example)]
    if len(found) != len(case.wanted):
        return "wrong", meaningful, [f"{len(found)} turns of {len(case.wanted)}"]
    wrong = [
        reason
        for wanted, (prompt, written) in zip(case.wanted, found, strict=True)
        for reason in oracle.judge(case, wanted, prompt, written)
    ]
    words = (" drops ", "shows nothing", "not learned", "has no place")
    dropped = [note for note in encoded.notes if any(word in note for word in words)]
    if wrong:
        said = set(wrong) <= {"no answer", "no thought"} and dropped and not meaningful
        return ("said" if said else "wrong"), meaningful, [*wrong, *encoded.notes]
    if meaningful:
        return "right", True, []
    return ("said" if dropped else "wrong"), False, [*encoded.notes, "dropped without a word"]


def row(name: str) -> tuple[str, Counter[tuple[str, bool]], list[str]]:
    """A template's line in the page, its counts by verdict and meaning, and its cells that are wrong."""
    oracle = Oracle(name)
    counts: Counter[tuple[str, bool]] = Counter()
    wrong = []
    for shape in SHAPES:
        found, meaningful, why = verdict(oracle, shape)
        counts[found, meaningful] += 1
        if found == "wrong" or (found == "refused" and meaningful):
            wrong.append(f"{name}, {shape}: {found}: {'; '.join(why)}")
    numbers = " | ".join(str(sum(n for (v, _), n in counts.items() if v == wanted)) for wanted in VERDICTS)
    return f"| {name} | {numbers} |", counts, wrong


def page() -> str:
    total: Counter[tuple[str, bool]] = Counter()
    rows = []
    for name in NAMES:
        line, counts, wrong = row(name)
        rows.append(line)
        total += counts
        print(*wrong, sep="\n", end="\n" if wrong else "")
    sums = " | ".join(f"**{sum(n for (v, _), n in total.items() if v == wanted)}**" for wanted in VERDICTS)
    meaningful = sum(n for (_, can), n in total.items() if can)
    right = total["right", True]
    head = _HEAD.format(
        shapes=len(SHAPES), templates=len(NAMES), version=trl.__version__, cells=total.total(), meaningful=meaningful,
        right=right, share=right / meaningful, names="\n".join(f"- `{shape}`" for shape in SHAPES),
    )  # fmt: skip
    return head + "\n".join([*rows, f"| all | {sums} |"]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"wrote {PAGE}")
