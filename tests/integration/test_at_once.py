"""Parts of a micro-batch that are computed at once: the same numbers, and only on models that keep nothing."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import pytest
import torch
from architectures import tiny_model
from peft import LoraConfig, get_peft_model
from tiny_registry import CHAT, interrupt
from torch import nn

from stackctl.engine.at_once import AtOnce, computations_at_once, keeps_nothing
from stackctl.engine.data.examples import IGNORED, Example
from stackctl.engine.data.rows import collate
from stackctl.engine.evaluation import scoring, weight_fit
from stackctl.engine.loss.logits import supervised_loss, supervised_token_losses
from stackctl.engine.noise import OwnDropout
from stackctl.engine.training import memory, trainer
from stackctl.engine.training import run as run_module

RECORDS = [CHAT[number % len(CHAT)] for number in range(24)]
PAIRS = [{"prompt": f"{n}?", "chosen": "x" * (n + 1), "rejected": "y" * (20 - n)} for n in range(16)]
ANSWERS = [{"prompt": p["prompt"], "completion": p["chosen"], "label": n % 2 == 0} for n, p in enumerate(PAIRS)]
LONG = {"messages": [*CHAT[0]["messages"][:1], {"role": "assistant", "content": "x" * 70}]}
SHORT = 60
"""Tokens of a part that has all threads, in which a small micro-batch is several parts."""


def train(h: Any, name: str, *options: object, records: list[dict[str, Any]] = RECORDS, code: int = 0) -> Any:
    return h.train(name, "--rank", 4, "--alpha", 8, "--batch-size", 8, *options, records=records, code=code)


@pytest.fixture
def threads() -> Iterator[None]:
    """Torch has two threads, as on a machine with two cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def at_once(threads: None) -> Iterator[AtOnce]:
    made = AtOnce(2)
    yield made
    made.close()


def test_each_has_its_share_of_the_threads_and_results_come_in_order(at_once: AtOnce) -> None:
    together = threading.Barrier(2)

    def work(number: int) -> tuple[int, int]:
        together.wait(timeout=10)  # the two of them are at work at the same time
        time.sleep(0.01 * (4 - number))
        return number, torch.get_num_threads()

    assert list(at_once.map(work, range(4))) == [(0, 1), (1, 1), (2, 1), (3, 1)]
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(("there", "count"), [(1, 1), (2, 2), (3, 3), (4, 2), (16, 2)])
def test_how_many_are_computed_at_once(threads: None, there: int, count: int) -> None:
    torch.set_num_threads(there)
    assert computations_at_once() == count


def test_one_that_fails_ends_all(at_once: AtOnce) -> None:
    begun = threading.Event()
    done = list[int]()

    def work(number: int) -> None:
        if number == 0:
            begun.wait(timeout=10)
            raise ValueError("wrong")
        begun.set()
        for _ in range(2000):
            time.sleep(0.01)
        done.append(number)

    before = time.monotonic()
    with pytest.raises(ValueError, match="wrong"):
        list(at_once.map(work, range(4)))
    assert done == []
    assert time.monotonic() - before < 10
    assert list(at_once.map(lambda number: number, [1, 2])) == [1, 2]


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(
    ("objective", "records", "options"),
    [
        ("sft", RECORDS, ()),
        ("sft", [*RECORDS[:7], LONG] * 3, ()),
        ("sft", [{"text": "abc " * (1 + n % 7)} for n in range(40)], ("--pack", "--max-length", 64)),
        ("dpo", PAIRS, ()),
        ("kto", ANSWERS, ()),
    ],
)
def test_parts_at_once_have_the_gradient_of_the_whole(
    h: Any,
    monkeypatch: pytest.MonkeyPatch,
    gradients: list[dict[str, torch.Tensor]],
    objective: str,
    records: list[dict[str, Any]],
    options: tuple[object, ...],
) -> None:
    options = ("--objective", objective, "--dtype", "float32", "--max-steps", 2, *options)
    seen = set[tuple[int, int]]()
    right = trainer.micro_batch_loss

    def watched(model: Any, inputs: dict[str, Any], *more: Any) -> Any:
        seen.add((threading.get_ident(), torch.get_num_threads()))
        return right(model, inputs, *more)

    monkeypatch.setattr(trainer, "micro_batch_loss", watched)
    runs = []
    for name, most, count in (("whole", 10**6, 1), ("parts", SHORT, 2)):
        monkeypatch.setattr(memory, "PART", most)
        monkeypatch.setattr(memory, "computations_at_once", lambda count=count: count)
        seen.clear()
        runs.append(train(h, name, *options, records=records))
        of_threads = [number for thread, number in seen if thread != threading.get_ident()]
        assert of_threads == [1] * len(of_threads)
        assert len(of_threads) == (2 if count == 2 else 0)
    whole, parts = runs
    for key in ("tokens", "supervised_tokens", "steps", "batch_size", "gradient_accumulation"):
        assert parts[key] == whole[key]
    assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-6)
    for first, second in zip(gradients[:2], gradients[2:], strict=True):
        largest = max(float(value.abs().max()) for value in first.values())
        assert all(float((second[name] - value).abs().max()) <= 1e-6 * largest for name, value in first.items())


@pytest.mark.usefixtures("threads")
def test_the_same_run_has_the_same_weights_and_one_that_goes_on_too(h: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "PART", SHORT)
    options = ("--epochs", 2, "--save-steps", 1)
    first = train(h, "first", *options)["digest"]
    assert train(h, "second", *options)["digest"] == first
    h.at_step(3, interrupt)
    train(h, "new", *options, code=130)
    h.at_step(0, interrupt)
    monkeypatch.setattr(memory, "computations_at_once", lambda: 1)
    assert train(h, "new", *options, "--resume")["digest"] == first


@pytest.fixture
def threads_that_score(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[tuple[int, int]]]:
    """Which threads compute losses, and with how many for torch; two records of a row are many."""
    seen = set[tuple[int, int]]()

    def watched(model: Any, batch: dict[str, torch.Tensor], **more: Any) -> Any:
        seen.add((threading.get_ident(), torch.get_num_threads()))
        return supervised_token_losses(model, batch, **more)

    monkeypatch.setattr(scoring, "_ROW", 64)
    monkeypatch.setattr(scoring, "_BESIDE", 128)
    for module in (scoring, weight_fit):
        monkeypatch.setattr(module, "supervised_token_losses", watched)
    yield seen


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(
    "command",
    [
        ("eval", "style+instruct", "style"),
        ("compare", "style", "base", "-p", "the sea"),
        ("compose", "style:0.5+instruct", "--fit-steps", 2),
    ],
)
def test_losses_at_once_are_those_of_one_after_another(
    style_and_instruct: Any,
    monkeypatch: pytest.MonkeyPatch,
    threads_that_score: set[tuple[int, int]],
    command: tuple[object, ...],
) -> None:
    h = style_and_instruct
    data = h.data([{"text": word * times} for word in ("the sea ", "cold water ", "well ") for times in (2, 5, 7, 40)])
    found = []
    for count in (1, 2):
        monkeypatch.setattr(scoring, "computations_at_once", lambda count=count: count)
        threads_that_score.clear()
        option = ("--name", f"s{count}", "--fit") if command[0] == "compose" else ("--data",)
        found.append(h.run(*command, *option, data, "--json").json)
        by_others = {numbers for thread, numbers in threads_that_score if thread != threading.get_ident()}
        assert by_others == ({1} if count == 2 else set())
        assert (threading.get_ident(), 2) in threads_that_score, "a long row has all threads"
    one, other = (sorted(numbers_of(document).items()) for document in found)
    assert [name for name, _ in one] == [name for name, _ in other]
    assert [value for _, value in other] == pytest.approx([value for _, value in one], rel=1e-4, abs=1e-6)


def numbers_of(document: Any, place: str = "") -> dict[str, float]:
    """Every number in a document but its times, by where it stands."""
    if isinstance(document, dict | list):
        items = document.items() if isinstance(document, dict) else enumerate(document)
        return {name: value for key, one in items for name, value in numbers_of(one, f"{place}/{key}").items()}
    return {place: document} if isinstance(document, int | float) and "second" not in place else {}


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("objective", ["sft", "dpo", "kto"])
def test_a_run_looks_at_its_held_out_records_and_its_reference_at_once(
    h: Any, monkeypatch: pytest.MonkeyPatch, threads_that_score: set[tuple[int, int]], objective: str
) -> None:
    monkeypatch.setattr(memory, "PART", SHORT)
    records = {"sft": RECORDS, "dpo": PAIRS, "kto": ANSWERS}[objective]
    held = h.data(records[:9], "held.jsonl")
    options = ("--objective", objective, "--dtype", "float32", "--max-steps", 1, "--eval-data", held)
    losses = []
    for name, count in (("one", 1), ("other", 2)):
        monkeypatch.setattr(memory, "computations_at_once", lambda count=count: count)
        threads_that_score.clear()
        done = train(h, name, *options, records=records)
        losses.append([done["eval_loss_before"], done["eval_loss"]])
        assert any(thread != threading.get_ident() for thread, _ in threads_that_score) == (count == 2)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(
    ("objective", "records", "options"),
    [
        ("sft", RECORDS[:21], ("--epochs", 2)),
        ("sft", [{"text": "abc " * (1 + n % 7)} for n in range(40)], ("--pack", "--max-length", 64, "--epochs", 1)),
        ("sft", RECORDS, ("--dropout", 0.1, "--max-steps", 3)),
        ("dpo", PAIRS, ("--epochs", 1)),
        ("kto", ANSWERS, ("--epochs", 1)),
    ],
)
def test_micro_batches_of_a_step_are_computed_as_one(
    h: Any, monkeypatch: pytest.MonkeyPatch, objective: str, records: list[dict[str, Any]], options: tuple[object, ...]
) -> None:
    """Small ones are as fast as large ones, and give the same bits; the run says what was asked for."""
    monkeypatch.setattr(memory, "PART", SHORT)
    options = ("--objective", objective, *options)
    one = train(h, "one", *options, records=records)
    several = train(h, "several", *options, "--batch-size", 2, "--gradient-accumulation", 4, records=records)
    assert several["digest"] == one["digest"]
    assert [one[key] for key in ("steps", "tokens", "loss")] == [several[key] for key in ("steps", "tokens", "loss")]
    assert (one["batch_size"], one["gradient_accumulation"]) == (8, 1)
    assert (several["batch_size"], several["gradient_accumulation"]) == (2, 4)


def adapted(model_type: str, **besides: Any) -> nn.Module:
    model = tiny_model(model_type, **besides)
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    return get_peft_model(model, config).train()


def batch_of(*lengths: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    ids = [torch.randint(0, 200, (length,), generator=draw).tolist() for length in lengths]
    return collate([Example(tokens, [IGNORED, *tokens[1:]]) for tokens in ids])


def gradient(model: nn.Module, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    loss = supervised_loss(model, batch, one_by_one=True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = torch.autograd.grad(loss, trained, allow_unused=True)
    return [loss.detach(), *(value for value in found if value is not None)]


@pytest.mark.parametrize(
    "model_type",
    ["llama", "gpt2", "gemma3_text", "qwen3", "phi3", "olmo2", "jamba", "lfm2", "gpt_oss", "cohere2"],
)
def test_what_is_computed_at_once_is_equal_bit_for_bit(at_once: AtOnce, model_type: str) -> None:
    model = adapted(model_type)
    assert keeps_nothing(model, lambda: gradient(model, batch_of(12)))
    batches = [batch_of(9, 5), batch_of(23), batch_of(4, 4, 4), batch_of(17), batch_of(30), batch_of(8, 3)]
    torch.set_num_threads(1)
    apart = [gradient(model, batch) for batch in batches]
    torch.set_num_threads(2)
    together = at_once.map(lambda batch: gradient(model, batch), batches * 2)
    for one, other in zip(apart * 2, together, strict=True):
        assert all(torch.equal(*pair) for pair in zip(one, other, strict=True))


def test_a_model_that_keeps_something_is_computed_by_one_thread_at_a_time() -> None:
    compute = batch_of(12)

    def keeps(model: nn.Module) -> bool:
        return not keeps_nothing(model, lambda: gradient(model, compute))

    assert not keeps(adapted("llama"))
    assert keeps(adapted("mixtral")), "PEFT writes an adapter on experts into their parameters in each pass"
    rotary = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    assert keeps(adapted("llama", rope_parameters=rotary))
    for name, change in {
        "a number": lambda module: setattr(module, "calls", getattr(module, "calls", 0) + 1),
        "a tensor": lambda module: setattr(module, "last", torch.ones(3)),
        "an entry": lambda module: vars(module).setdefault("log", []).append(object()),
        "a buffer": lambda module: module.inv_freq.mul_(1.0),
    }.items():
        model = adapted("llama")
        model.get_base_model().model.rotary_emb.register_forward_pre_hook(lambda module, _, do=change: do(module))
        assert keeps(model), name


def test_somebody_s_own_code_is_called_by_one_thread() -> None:
    model = adapted("llama")

    class Norm(type(model.get_base_model().model.norm)):  # type: ignore[misc]
        pass

    model.get_base_model().model.norm.__class__ = Norm
    assert not keeps_nothing(model, lambda: None)


@pytest.mark.usefixtures("threads")
def test_parts_draw_dropout_of_their_own(h: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which does not depend on what is computed meanwhile, and goes on where a run does."""
    monkeypatch.setattr(memory, "PART", SHORT)
    shares = list[torch.Tensor]()
    right = OwnDropout.mask

    def watched(self: OwnDropout, x: torch.Tensor) -> torch.Tensor:
        found = right(self, x)
        if threading.current_thread() is not threading.main_thread():
            shares.append(found)
        return found

    monkeypatch.setattr(OwnDropout, "mask", watched)
    options = ("--epochs", 2, "--save-steps", 1, "--dropout", 0.3)
    first = train(h, "first", *options)["digest"]
    assert shares
    assert len({mask.flatten()[:64].numpy().tobytes() for mask in shares}) == len(shares), "no two are the same"
    assert train(h, "second", *options)["digest"] == first
    h.at_step(3, interrupt)
    train(h, "new", *options, code=130)
    h.at_step(0, interrupt)
    assert train(h, "new", *options, "--resume")["digest"] == first


@pytest.mark.usefixtures("threads")
def test_looking_at_held_out_records_draws_nothing(h: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("_ROW", 64), ("_BESIDE", 128)):
        monkeypatch.setattr(scoring, name, value)
    monkeypatch.setattr(memory, "PART", SHORT)
    options = ("--max-steps", 3, "--dropout", 0.3)
    digest = train(h, "plain", *options)["digest"]
    assert train(h, "watched", *options, "--eval-data", h.data(RECORDS[:9], "held.jsonl"))["digest"] == digest


@pytest.mark.usefixtures("threads")
def test_noise_of_the_base_is_drawn_by_one_thread(h: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "PART", SHORT)
    made = list[bool]()
    monkeypatch.setattr(run_module, "AtOnce", lambda count, noise: made.append(noise))
    train(h, "new", "--max-steps", 1, "--dropout", 0.1)
    train(h, "other", "--max-steps", 1)
    assert made == [True, False]
    right = run_module.attach_all

    def attach(*arguments: Any) -> Any:
        attached = right(*arguments)
        attached.model.get_base_model().model.layers[0].self_attn.attention_dropout = 0.1
        return attached

    monkeypatch.setattr(run_module, "attach_all", attach)
    train(h, "noisy", "--max-steps", 1, "--dropout", 0.1)
    assert made == [True, False]


@pytest.mark.usefixtures("threads")
def test_less_memory_is_needed_one_after_another(h: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a run writes down how many were computed at once, for the one that goes on."""
    monkeypatch.setattr(memory, "PART", SHORT)
    cuts = list[dict[str, Any]]()
    chosen = memory.plan_step

    def watched(*arguments: Any) -> Any:
        plan = chosen(*arguments)
        cuts.extend(map(asdict, (plan.cut, *plan.smaller)))
        return plan

    monkeypatch.setattr("stackctl.engine.training.run.plan_step", watched)
    train(h, "new", "--max-steps", 1)
    assert [(cut["at_once"], cut["checkpointing"]) for cut in cuts] == [(2, False), (1, False), (1, True)]
