"""Evaluation: records in rows beside the same records one by one and in padded batches; short and uneven chats."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.generation import prepare
from benchmarks.timing import compare, parse_runs, show, timed
from benchmarks.training import write_chats
from stackctl.registry.base_entries import resolve_base
from stackctl.registry.planning import read_plan
from stackctl.registry.resolve import resolve_expression

if TYPE_CHECKING:
    from stackctl.engine.data.examples import Example

_KINDS = {"short chats": (32, 15), "uneven chats": (10, 85)}
"""How many, and the median of their answers in words."""
_PADDED = 8
_ALONE = "one by one"


def main(options: Sequence[str] = ()) -> None:
    runs = parse_runs(options, "evaluation", 3)
    from stackctl.engine.data.encoding import encode
    from stackctl.engine.data.examples import EncodeOptions
    from stackctl.engine.evaluation.scoring import DataSet, Scoring, score_examples
    from stackctl.engine.libraries import quiet_libraries
    from stackctl.engine.models import load_base
    from stackctl.engine.records.read import read_records
    from stackctl.registry.store import Registry

    quiet_libraries()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        registry = Registry(folder / "registry")
        stacked = load_base(resolve_base(registry, "smollm2"), registry)
        stacked.use(read_plan(registry, resolve_expression(registry, "a0+a1")))
        for kind, (count, median) in _KINDS.items():
            path = folder / f"{kind.replace(' ', '-')}.jsonl"
            write_chats(path, count, median, seed=1)
            examples = encode(read_records(path), stacked.tokenizer, EncodeOptions(1024)).examples
            data = DataSet(kind, examples, list(range(len(examples))))
            lengths = sorted(len(example.input_ids) for example in examples)
            print(f"\n{kind}: {count}, of {lengths[0]} to {lengths[-1]} tokens, median {lengths[count // 2]}")
            losses = {
                _ALONE: [score.loss for score in score_examples(stacked.model, examples)],
                "in rows": [score.loss for score in Scoring(stacked, [data]).score("")[0].records],
            }
            apart = max(abs(a - b) / a for a, b in zip(*losses.values(), strict=True))
            print(f"a record's loss in a row and alone: {apart:.1e} apart at most")
            candidates = {
                _ALONE: timed(lambda given=examples: score_examples(stacked.model, given)),
                "in rows, with the look whether it may": timed(lambda given=data: Scoring(stacked, [given]).score("")),
                f"{_PADDED} of like length, padded": timed(
                    lambda given=examples: _padded(stacked.model, sorted(given, key=lambda e: len(e.input_ids)))
                ),
            }
            show(compare(candidates, runs), _ALONE)


def _padded(model: Any, examples: Sequence[Example]) -> float:
    """The summed loss in padded batches, with logits where there are labels only."""
    import torch
    from torch.nn import functional

    total = 0.0
    with torch.no_grad():
        for start in range(0, len(examples), _PADDED):
            batch = examples[start : start + _PADDED]
            width = max(len(example.input_ids) for example in batch)
            ids = torch.tensor([e.input_ids + [0] * (width - len(e.input_ids)) for e in batch])
            mask = torch.tensor([[1] * len(e.input_ids) + [0] * (width - len(e.input_ids)) for e in batch])
            labels = torch.tensor([[*e.labels[1:], *[-100] * (width + 1 - len(e.labels))] for e in batch])
            hidden = model.get_decoder()(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            asked = labels >= 0
            logits = model.get_output_embeddings()(hidden[asked])  # (K, vocabulary)
            total += float(functional.cross_entropy(logits, labels[asked], reduction="sum"))
    return total
