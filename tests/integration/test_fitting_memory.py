"""How steps are cut and whether activations are kept follows from the memory there is, and changes no number."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny_registry import CHAT, interrupt

from stackctl.engine.training import memory, trainer
from stackctl.engine.training import run as run_module
from stackctl.registry.store import Registry

WEIGHTS = "adapter_model.safetensors"
KEPT, AGAIN = "--no-gradient-checkpointing", "--gradient-checkpointing"
RECORDS = [CHAT[number % len(CHAT)] for number in range(24)]
PAIRS = [{"prompt": f"{n}?", "chosen": "x" * (n + 1), "rejected": "y" * (20 - n)} for n in range(16)]


@pytest.fixture
def roomy(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let there be so many bytes of memory."""
    return lambda room: monkeypatch.setattr(memory, "_available", lambda group: (room, True))


def dry(h: Any, *options: object, records: list[dict[str, Any]] = RECORDS) -> Any:
    return h.run("train", "new", "--data", h.data(records), *usual(options), "--dry-run", "--json")


def train(h: Any, name: str, *options: object, records: list[dict[str, Any]] = RECORDS, code: int = 0) -> Any:
    return h.train(name, *usual(options), records=records, code=code)


def usual(options: tuple[object, ...]) -> tuple[object, ...]:
    return ("--rank", 4, "--alpha", 8, *(() if "--batch-size" in options else ("--batch-size", 8)), *options)


def needed(h: Any, *options: object, records: list[dict[str, Any]] = RECORDS) -> int:
    return int(dry(h, *options, records=records).json["memory"]["total"])


def run_of(h: Any, name: str) -> Any:
    return Registry(h.folder / "registry").find_adapter(name).newest().run


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_activations_are_computed_again_where_they_fit_only_so(h: Any, roomy: Any, dropout: float) -> None:
    options = ("--dropout", dropout, "--max-steps", 3)
    kept, again = needed(h, *options, KEPT), needed(h, *options, AGAIN)
    assert again < kept
    roomy(again)
    told = dry(h, *options)
    assert told.json["gradient_checkpointing"] is True
    assert told.json["memory"]["total"] == again
    assert (
        "activations are computed again"
        in h.run("train", "new", "--data", h.data(RECORDS), *usual(options), "--dry-run").out
    )
    trained = train(h, "new", *options)
    assert trained["gradient_checkpointing"] is True
    assert run_of(h, "new").gradient_checkpointing is True
    refused = train(h, "plain", *options, KEPT)
    assert refused["gradient_checkpointing"] is False
    assert refused["loss"] == trained["loss"]
    assert h.bytes_of("new")[WEIGHTS] == h.bytes_of("plain")[WEIGHTS]


def test_they_are_kept_where_there_is_room_and_where_it_would_not_help(h: Any, roomy: Any) -> None:
    kept, again = needed(h, KEPT), needed(h, AGAIN)
    for room in (kept, again - 1):
        roomy(room)
        told = dry(h).json
        assert told["gradient_checkpointing"] is False
        assert told["memory"]["fits"] is (room == kept)
    assert dry(h, AGAIN).json["gradient_checkpointing"] is True


def test_a_model_that_cannot_is_left_alone_or_refused(
    tiny_registry: Any, roomy: Any, forget_targets: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaPreTrainedModel

    h = tiny_registry()
    roomy(needed(h, AGAIN))
    monkeypatch.setattr(LlamaPreTrainedModel, "supports_gradient_checkpointing", False)
    forget_targets()
    assert dry(h).json["gradient_checkpointing"] is False
    error = train(h, "new", AGAIN, code=4)["error"]
    assert "LlamaForCausalLM" in error["message"]


@pytest.mark.parametrize(
    ("objective", "records"), [("sft", RECORDS), ("dpo", PAIRS), ("kto", [
        {"prompt": p["prompt"], "completion": p["chosen"], "label": n % 2 == 0} for n, p in enumerate(PAIRS)
    ])],
)  # fmt: skip
def test_the_largest_micro_batch_that_fits_has_the_gradient_of_the_whole_step(
    h: Any, roomy: Any, gradients: list[dict[str, torch.Tensor]], objective: str, records: list[dict[str, Any]]
) -> None:
    options = ("--objective", objective, "--dtype", "float32", "--max-steps", 2)
    two = needed(h, *options, "--batch-size", 2, records=records)
    roomy(two)
    told = dry(h, *options, "--batch-size", "auto", records=records).json
    assert (told["batch_size"], told["gradient_accumulation"]) == (2, 4)
    assert told["settings"]["batch_size"] == 8
    assert told["memory"]["total"] == two
    cut = train(h, "new", *options, "--batch-size", "auto", records=records)
    whole = train(h, "whole", *options, "--batch-size", 8, "--no-gradient-checkpointing", records=records)
    assert (cut["batch_size"], cut["gradient_accumulation"], cut["gradient_checkpointing"]) == (2, 4, False)
    assert (whole["batch_size"], whole["gradient_accumulation"]) == (8, 1)
    run = run_of(h, "new")
    assert (run.batch_size, run.gradient_accumulation) == (2, 4)
    first, second = gradients[0], gradients[2]  # two steps of each run
    largest = max(float(value.abs().max()) for value in second.values())
    assert largest > 0
    assert all(float((first[name] - value).abs().max()) <= 1e-6 * largest for name, value in second.items())
    assert cut["tokens"] == whole["tokens"]
    assert cut["loss"] == pytest.approx(whole["loss"], rel=1e-5)


@pytest.mark.parametrize(("objective", "records", "processes"), [
    ("sft", RECORDS, 1), ("sft", RECORDS, 2), ("dpo", PAIRS, 1), ("kto", [
        {"prompt": p["prompt"], "completion": p["chosen"], "label": n % 2 == 0} for n, p in enumerate(PAIRS)
    ], 1),
])  # fmt: skip
@pytest.mark.usefixtures("forked_ranks")
def test_a_micro_batch_in_parts_has_the_gradient_of_the_whole(
    h: Any,
    monkeypatch: pytest.MonkeyPatch,
    gradients: list[dict[str, torch.Tensor]],
    objective: str,
    records: list[dict[str, Any]],
    processes: int,
) -> None:
    options = ("--objective", objective, "--dtype", "float32", "--max-steps", 2, "--num-processes", processes)
    runs, estimates, sizes = [], [], list[int]()
    right = trainer.micro_batch_loss

    def counted(model: Any, inputs: dict[str, Any], *more: Any) -> Any:
        sizes.append(inputs["input_ids"].numel())
        return right(model, inputs, *more)

    monkeypatch.setattr(trainer, "micro_batch_loss", counted)
    for name, most in (("whole", 10**6), ("parts", 60)):
        monkeypatch.setattr(memory, "PART", most)
        sizes.clear()
        estimates.append(needed(h, *options, records=records))
        runs.append(train(h, name, *options, records=records))
        if processes == 1:
            assert len(sizes) == 2 if name == "whole" else len(sizes) > 2, sizes
    assert estimates[1] < estimates[0]
    whole, parts = runs
    for key in ("tokens", "supervised_tokens", "steps", "batch_size", "gradient_accumulation"):
        assert parts[key] == whole[key]
    assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-6)
    # Two steps of each run, if they are in this process.
    for first, second in zip(gradients[:2], gradients[2:], strict=True):
        largest = max(float(value.abs().max()) for value in first.values())
        assert all(float((second[name] - value).abs().max()) <= 1e-6 * largest for name, value in first.items())


def test_a_resumed_run_keeps_its_parts(h: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("--epochs", 2, "--save-steps", 1, "--dropout", 0.2)
    monkeypatch.setattr(memory, "PART", 60)
    whole = train(h, "whole", *options)
    h.at_step(3, interrupt)
    train(h, "new", *options, code=130)
    h.at_step(0, interrupt)
    monkeypatch.setattr(memory, "PART", 10**6)
    assert train(h, "new", *options, "--resume")["digest"] == whole["digest"]


def test_a_step_stays_what_the_file_says(h: Any, roomy: Any) -> None:
    roomy(needed(h, "--batch-size", 3, "--rank", 16, "--alpha", 32))
    (h.folder / "stackctl.yaml").write_text(
        f"base: tiny\ntrain:\n"
        f"  one: {{data: {h.data(RECORDS)}, batch_size: 6, gradient_accumulation: 2, max_steps: 1}}\n"
        f"  two: {{data: {h.data(RECORDS)}, batch_size: auto, max_steps: 1}}\n"
    )
    told = h.run("train", "one", "--batch-size", "auto", "--dry-run", "--json").json
    assert (told["batch_size"], told["gradient_accumulation"]) == (3, 4)
    assert (told["settings"]["batch_size"], told["settings"]["gradient_accumulation"]) == (6, 2)
    built = h.run("train", "--json").json["built"]
    assert {(b["adapter"], b["batch_size"], b["gradient_accumulation"]) for b in built} == {
        ("one", 6, 2),
        ("two", 2, 4),
    }
    assert h.run("train", "--json").json["built"] == []
    h.run("train", "one", "--batch-size", "auto")
    assert h.run("train", "--json").json["built"] == [], "how a step is cut makes nothing out of date"


def test_where_nothing_fits_the_least_is_taken(h: Any, roomy: Any) -> None:
    roomy(1000)
    told = dry(h, "--batch-size", "auto").json
    assert (told["batch_size"], told["gradient_accumulation"], told["gradient_checkpointing"]) == (1, 8, True)
    assert told["memory"]["fits"] is False


def test_a_resumed_run_keeps_how_it_was_cut(h: Any, roomy: Any) -> None:
    options = ("--batch-size", "auto", "--epochs", 2, "--save-steps", 1, "--dropout", 0.2)
    enough = needed(h, *options)
    roomy(needed(h, "--batch-size", 2, "--dropout", 0.2))
    whole = train(h, "whole", *options)
    h.at_step(3, interrupt)
    train(h, "new", *options, code=130)
    h.at_step(0, interrupt)
    roomy(enough)
    resumed = train(h, "new", *options, "--resume")
    assert (resumed["batch_size"], resumed["gradient_accumulation"]) == (2, 4)
    assert resumed["digest"] == whole["digest"]
    assert train(h, "other", *options)["batch_size"] == 8


@pytest.mark.usefixtures("forked_ranks")
def test_several_processes_cut_alike(h: Any, roomy: Any) -> None:
    options = ("--num-processes", 2, "--max-steps", 2, "--dtype", "float32")
    roomy(2 * needed(h, *options, "--batch-size", 2))
    both = train(h, "both", *options, "--batch-size", "auto")
    assert (both["batch_size"], both["gradient_accumulation"], both["processes"]) == (2, 4, 2)
    whole = train(h, "whole", *options, "--batch-size", 8)
    assert (whole["batch_size"], whole["tokens"]) == (8, both["tokens"])
    assert both["loss"] == pytest.approx(whole["loss"], rel=1e-5)


def test_what_runs_out_of_memory_is_cut_smaller(h: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = memory.micro_batch_loss
    tried: list[tuple[int, bool]] = []

    def small(model: Any, inputs: dict[str, Any], *more: Any) -> Any:
        records = int((inputs["position_ids"] == 0).sum())
        inner = model.get_base_model()
        tried.append((records, inner.is_gradient_checkpointing))
        if records > 1 or not inner.is_gradient_checkpointing:
            raise torch.OutOfMemoryError("no room")
        return real(model, inputs, *more)

    monkeypatch.setattr(run_module, "runs_out_safely", lambda device: True)
    monkeypatch.setattr(memory, "micro_batch_loss", small)
    options = ("--max-steps", 2, "--dropout", 0.3)
    done = train(h, "new", "--batch-size", "auto", *options)
    assert tried == [(size, again) for again in (False, True) for size in (8, 4, 2, 1)]
    assert (done["batch_size"], done["gradient_accumulation"], done["gradient_checkpointing"]) == (1, 8, True)
    monkeypatch.setattr(memory, "keeps_parts", lambda: True)  # a CPU would compute the micro-batches as one
    untried = train(h, "untried", "--batch-size", 1, "--gradient-accumulation", 8, *options)
    assert h.bytes_of("new")[WEIGHTS] == h.bytes_of("untried")[WEIGHTS], "trying leaves no trace"
    assert untried["loss"] == done["loss"]

    monkeypatch.setattr(memory, "micro_batch_loss", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("x")))
    error = train(h, "never", "--batch-size", "auto", *options, code=1)["error"]
    assert "memory is full" in error["message"]


@pytest.mark.parametrize("value", ["0", "-1", "many", "2.5"])
def test_what_is_no_batch_size_is_2(h: Any, value: str) -> None:
    error = train(h, "new", "--batch-size", value, code=2)["error"]
    assert "batch-size" in error["message"]


@pytest.mark.parametrize(
    ("lengths", "records", "fullest"),
    [([1024] * 4, 4, 1024), ([9, 1500, 30], 2, 1530), ([9, 1500, 30], 1, 1500), ([2000], 1, 0)],
)
def test_the_fullest_part_is_of_whole_records(lengths: list[int], records: int, fullest: int) -> None:
    assert memory._largest_part(np.array(lengths), records, 1536) == fullest
