"""The traps of stacking: the naive way with raw PEFT really is wrong, and stackctl's is right or refuses.

Traps that are measured elsewhere: sums in test_composition, resuming and documents in a row in test_training,
padding that is an end of turn in test_generation.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from peft import IA3Config, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import random_adapter, tiny_tokenizer
from tiny_registry import CHAT, TEXTS
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

from stackctl.core.errors import StackctlError, VerificationFailed
from stackctl.engine.training import attach as attaching
from stackctl.engine.training import proofs
from stackctl.engine.training import register as registering
from stackctl.plan.stack_plan import Problem


def two_adapters(h: Any) -> Any:
    """Raw PEFT with style and instruct loaded, as people do it by hand."""
    model = PeftModel.from_pretrained(oracle.load_plain(h.base), h.paths["style"], adapter_name="style")
    model.load_adapter(h.paths["instruct"], adapter_name="instruct", is_trainable=True)
    return model


# -- style is active --------------------------------------------------------------------------------------------------


def test_set_adapter_switches_style_off(style_and_instruct: Any) -> None:
    model = two_adapters(style_and_instruct)
    model.set_adapter("instruct")
    assert (
        oracle.relative(
            oracle.logits(model.double()), style_and_instruct.live(("instruct", 1)), style_and_instruct.live()
        )
        < 1e-9
    )
    with pytest.raises(TypeError):
        two_adapters(style_and_instruct).set_adapter(["style", "instruct"])
    assert style_and_instruct.error(style_and_instruct.load(), "style+instruct", ("style", 1), ("instruct", 1)) < 1e-5


@pytest.mark.parametrize("frozen", ["fold", "live"])
def test_a_training_with_style_off_is_caught(
    style_and_instruct: Any, frozen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Should the code ever forget style, the run ends with 5 and registers nothing."""

    def forgets_to_fold(stacked: Any, *_: Any) -> str:
        return frozen

    def forgets_to_activate(model: Any, plan: Any) -> None:
        attach_live(model, plan)
        for name, parameter in model.named_parameters():
            if ".frozen." in name:
                parameter.data.zero_()

    attach_live = attaching.attach_live
    monkeypatch.setattr(attaching, "freeze_stack", forgets_to_fold)
    monkeypatch.setattr(attaching, "attach_live", forgets_to_activate)
    style_and_instruct.train("new", "--frozen", frozen, "--max-steps", 2, on="style", code=5)
    assert style_and_instruct.adapters() == {"style", "instruct"}


# -- only the new adapter trains --------------------------------------------------------------------------------------


def test_activating_both_makes_both_trainable(style_and_instruct: Any) -> None:
    model = two_adapters(style_and_instruct)
    model.base_model.set_adapter(["style", "instruct"])
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name in trainable if ".style." in name}
    with pytest.raises(VerificationFailed):
        proofs.check_trainable(model)


def test_a_training_that_would_move_style_is_caught(style_and_instruct: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def leaves_it_trainable(*arguments: Any, **options: Any) -> Any:
        model = attach(*arguments, **options)
        for name, parameter in model.named_parameters():
            if ".frozen." in name:
                parameter.requires_grad_(True)
        return model

    attach = attaching.attach_new
    monkeypatch.setattr(attaching, "attach_new", leaves_it_trainable)
    style_and_instruct.train("new", "--frozen", "live", "--max-steps", 2, on="style", code=5)
    assert style_and_instruct.adapters() == {"style", "instruct"}


@pytest.mark.parametrize("frozen", ["fold", "live"])
def test_frozen_weights_that_moved_in_memory_are_caught(
    style_and_instruct: Any, frozen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were the optimizer, or anything else, to touch the frozen part, the run would end with 5."""
    models: list[Any] = []

    def remembers(*arguments: Any, **options: Any) -> Any:
        models.append(attach(*arguments, **options))
        return models[0]

    def nudge() -> None:
        wanted = "q_proj.base_layer.weight" if frozen == "fold" else "q_proj.lora_B.frozen.weight"
        for name, parameter in models[0].named_parameters():
            if name.endswith(wanted):
                parameter.data *= 1.001

    attach = attaching.attach_new
    monkeypatch.setattr(attaching, "attach_new", remembers)
    style_and_instruct.at_step(1, nudge)
    style_and_instruct.train("new", "--frozen", frozen, "--max-steps", 2, on="style", code=5)
    assert style_and_instruct.adapters() == {"style", "instruct"}


def test_trainers_own_resume_goes_on_with_the_wrong_adapter(style_and_instruct: Any, tmp_path: Path) -> None:
    """The trap; that stackctl's resumed run is the uninterrupted one is in test_training."""

    def trainer(steps: int) -> Any:
        model = two_adapters(style_and_instruct)
        model.base_model.set_adapter(["style", "instruct"])
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".instruct." in name)
        arguments = TrainingArguments(
            output_dir=str(tmp_path / "out"), max_steps=steps, save_steps=2, use_cpu=True, report_to="none",
            per_device_train_batch_size=1, disable_tqdm=True,
        )  # fmt: skip
        row = {"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, 4]}
        return Trainer(model=model, args=arguments, train_dataset=[row] * 8)

    trainer(2).train()
    resumed = trainer(4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    trains = {name for name, parameter in resumed.model.named_parameters() if parameter.requires_grad}
    assert trains
    assert not [name for name in trains if ".instruct." in name]


# -- no noise, the right place, the right labels ----------------------------------------------------------------------


def test_a_frozen_adapters_dropout_is_noise(h: Any) -> None:
    """That stackctl's frozen adapters make none is in test_training: its losses are those without dropout."""
    h.add("style", seed=1, lora_dropout=0.5)
    model = PeftModel.from_pretrained(oracle.load_plain(h.base), h.paths["style"]).train()
    assert not torch.equal(oracle.logits(model), oracle.logits(model))
    h.train("new", "--frozen", "live", "--max-steps", 1, on="style")
    h.train("again", "--frozen", "live", "--max-steps", 1, "--seed", 9, on="style")
    assert h.log("new")[0]["loss"] == pytest.approx(h.log("again")[0]["loss"], rel=1e-6)  # rows in another order


def test_selected_adapters_are_saved_into_a_folder_of_their_own(style_and_instruct: Any, tmp_path: Path) -> None:
    two_adapters(style_and_instruct).save_pretrained(tmp_path / "naive", selected_adapters=["instruct"])
    assert not (tmp_path / "naive" / "adapter_config.json").exists()
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        PeftModel.from_pretrained(oracle.load_plain(style_and_instruct.base), tmp_path / "naive")
    style_and_instruct.run("add", "nested", tmp_path / "naive")
    assert style_and_instruct.error(style_and_instruct.load(), "nested", ("instruct", 1)) < 1e-5


def test_masking_by_the_pad_token_drops_the_end_of_turn(tiny_registry: Any) -> None:
    ids, _ = oracle.label(TEXTS[0])
    batch = DataCollatorForLanguageModeling(tiny_tokenizer(), mlm=False)([{"input_ids": ids}])
    assert batch["labels"][0, -1] == -100, "nothing would ever learn to stop"
    h = tiny_registry()
    count = h.train("chat", "--max-steps", 1, records=CHAT[:1])["supervised_tokens"]
    assert count == len(oracle.byte_ids(CHAT[0]["messages"][1]["content"])) + 1


# -- what cannot be summed is refused by name, before anything is loaded ----------------------------------------------


def must_not_load(*_: Any, **__: Any) -> Any:
    raise AssertionError("a base was loaded")


def test_dora_in_pefts_cat_is_silently_wrong(h: Any, tmp_path: Path) -> None:
    """Why DoRA is refused: PEFT sums it without a word."""
    h.add("style", seed=1)
    h.paths["dora"] = random_adapter(h.base, tmp_path / "dora", seed=2, use_dora=True)
    model = PeftModel.from_pretrained(oracle.load_plain(h.base), h.paths["style"], adapter_name="style")
    model.load_adapter(h.paths["dora"], adapter_name="dora")
    model.add_weighted_adapter(["style", "dora"], [1.0, 1.0], "both", combination_type="cat")
    model.set_adapter("both")
    wanted = h.live(("style", 1), ("dora", 1))
    assert oracle.relative(oracle.logits(model.double()), wanted, h.live()) > 0.05


def test_another_peft_type_is_refused(h: Any, tmp_path: Path) -> None:
    config = IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    get_peft_model(oracle.load_plain(h.base), config).save_pretrained(tmp_path / "ia3")
    error = h.run("add", "ia3", tmp_path / "ia3", "--json", code=4).json["error"]
    assert "ia3" in error["message"].lower()
    assert h.adapters() == set()


def test_whole_modules_in_two_members_are_refused(h: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    h.add("style", seed=1, modules_to_save=["norm"])
    h.add("instruct", seed=2, modules_to_save=["norm"])
    h.add("plain", seed=3)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", must_not_load)
    for what in (["compose", "style+instruct"], ["generate", "style+instruct", "-p", "x"]):
        message = h.run(*what, "--json", code=4).json["error"]["message"]
        assert "style@1" in message
        assert "instruct@1" in message
    h.run("compose", "style+plain")
    h.run("compose", "style:0.5+plain", code=4)


def test_a_frozen_member_with_whole_modules(h: Any) -> None:
    h.add("style", seed=1, modules_to_save=["norm"])
    h.train("new", "--frozen", "live", "--max-steps", 2, on="style", code=4)
    h.train("new", "--max-steps", 2, on="style")
    wanted, losses = oracle.train(h.base, h.members(("style", 1)), CHAT, steps=2, learning_rate=0.003)
    assert h.log("new")[0]["loss"] == pytest.approx(losses[0], rel=1e-4)
    assert oracle.distance(oracle.factors_of(h.weights("new")), wanted) < 1e-4


# -- base and adapter fit ---------------------------------------------------------------------------------------------


def test_a_base_that_became_another_is_5(h: Any, models: Any, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    shutil.copytree(h.base, folder)
    h.run("base", "add", "mine", folder)
    h.run("add", "style", random_adapter(folder, tmp_path / "style", seed=1), "--base", "mine")
    h.run("generate", "style", "-p", "x", "--max-new-tokens", 2)
    other = models("llama", seed=5)
    PeftModel.from_pretrained(oracle.load_plain(other), tmp_path / "style")  # the trap: not a word
    shutil.copyfile(other / "model.safetensors", folder / "model.safetensors")
    h.run("generate", "style", "-p", "x", "--max-new-tokens", 2, code=5)
    h.run("train", "new", "--on", "style", "--data", h.data(), code=5)


def test_members_of_two_bases_are_refused(h: Any, models: Any, tmp_path: Path) -> None:
    h.add("style", seed=1)
    h.run("base", "add", "other", models("llama", seed=5))
    h.run("add", "alien", random_adapter(models("llama", seed=5), tmp_path / "alien", seed=2), "--base", "other")
    for what in (["compose", "style+alien"], ["generate", "style+alien", "-p", "x"]):
        message = h.run(*what, "--json", code=4).json["error"]["message"]
        assert "style" in message
        assert "alien" in message


def without_one(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[next(iter(tensors))]


def with_one_more(tensors: dict[str, torch.Tensor]) -> None:
    tensors["base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight"] = torch.zeros(4, 32)
    tensors["base_model.model.model.layers.9.self_attn.q_proj.lora_B.weight"] = torch.zeros(32, 4)


def of_another_shape(tensors: dict[str, torch.Tensor]) -> None:
    name = next(name for name in tensors if name.endswith("lora_A.weight"))
    tensors[name] = torch.zeros(4, 48)


def of_another_rank(tensors: dict[str, torch.Tensor]) -> None:
    for name in tensors:
        if "layers.0.self_attn.q_proj" in name:
            tensors[name] = tensors[name][:2] if "lora_A" in name else tensors[name][:, :2]
            tensors[name] = tensors[name].contiguous()


@pytest.mark.parametrize("damage", [without_one, with_one_more, of_another_shape, of_another_rank])
def test_tensors_that_find_no_place_are_refused(h: Any, damage: Any, tmp_path: Path) -> None:
    """The trap: PEFT loads what fits and warns, or passes over the rest."""
    path = random_adapter(h.base, tmp_path / "odd", seed=1)
    tensors = load_file(path / "adapter_model.safetensors")
    damage(tensors)
    save_file(tensors, path / "adapter_model.safetensors", {"format": "pt"})
    if damage in (without_one, with_one_more):
        PeftModel.from_pretrained(oracle.load_plain(h.base), path)
    h.run("add", "odd", path, code=4)
    assert h.adapters() == set()


def test_pickles_are_never_read(h: Any, tmp_path: Path) -> None:
    path = random_adapter(h.base, tmp_path / "old", seed=1)
    torch.save(load_file(path / "adapter_model.safetensors"), path / "adapter_model.bin")
    (path / "adapter_model.safetensors").unlink()
    h.run("add", "old", path, code=4)
    assert h.adapters() == set()


# -- other shapes of model --------------------------------------------------------------------------------------------


def test_gpt2_stores_its_weights_the_other_way_round(tiny_registry: Any) -> None:
    """The trap: of a square Conv1D, W + B @ A fits and is wrong."""
    h = tiny_registry("gpt2")
    h.add("style", seed=1, target_modules=["attn.c_proj"])
    model = oracle.load_plain(h.base, torch.float64)
    for name, delta in oracle.deltas(h.paths["style"]).items():
        model.get_submodule(name.removeprefix("base_model.model.")).weight.data += delta
    assert oracle.relative(oracle.logits(model), h.live(("style", 1)), h.live()) > 0.05
    assert h.error(h.load(), "style", ("style", 1)) < 1e-5


def test_training_a_mixture_stands_on_its_experts_and_not_on_its_router(tiny_registry: Any) -> None:
    """The trap: PEFT's all-linear means the router too, and twice the rank on experts that were two layers once."""
    h = tiny_registry("mixtral")
    naive, _ = oracle.train(h.base, [], TEXTS, steps=1, learning_rate=0.003)
    assert [name for name in naive if ".mlp.gate." in name]
    h.train("style", "--max-steps", 2, records=TEXTS)
    h.train("chat", "--max-steps", 2, "--frozen", "live", on="style")
    config = json.loads((h.weights("style") / "adapter_config.json").read_text())
    wanted, losses = oracle.train(
        h.base,
        [(h.weights("style"), 1)],
        CHAT,
        steps=2,
        learning_rate=0.003,
        targets=["q_proj", "k_proj", "v_proj", "o_proj"],
        parameters=config["target_parameters"],
    )
    found = oracle.factors_of(h.weights("chat"))
    assert {name.split(".lora_")[0].split(".", 5)[-1] for name in found if "experts" in name} == {
        "mlp.experts", "mlp.experts.base_layer",
    }  # fmt: skip
    assert h.log("chat")[0]["loss"] == pytest.approx(losses[0], rel=1e-4)
    assert oracle.distance(found, wanted) < 1e-4


def test_embedding_adapters_hold_copies_of_the_base(tiny_registry: Any) -> None:
    """PEFT writes the base's own embedding beside a LoRA on it; it is no part of the adapter."""
    h = tiny_registry("tied")
    path = h.add("style", seed=1, target_modules=["embed_tokens", "q_proj"])
    copies = [name for name in oracle.factors_of(path) if ".base_layer.weight" in name]
    assert copies
    found = h.run("inspect", "style", "--json").json
    assert found["problems"] == []
    shapes = [t.numel() for name, t in oracle.factors_of(path).items() if "lora_" in name]
    entry = h.run("ls", "--json").json["adapters"][0]["versions"][0]
    assert entry["parameters"] == sum(shapes)


# -- rounding ---------------------------------------------------------------------------------------------------------


def test_auto_folds_where_nothing_is_lost_and_else_keeps_the_stack_live(tiny_registry: Any) -> None:
    h = tiny_registry("llama", dtype=torch.bfloat16)
    h.add("style", seed=1, scale=0.03)
    exact = h.train("exact", "--dtype", "float32", "--max-steps", 2, on="style")
    assert exact["frozen"] == "fold"
    half = h.train("half", "--dtype", "bfloat16", "--max-steps", 2, on="style")
    assert half["frozen"] == "live", "in bfloat16 the fold would lose part of style"
    folded = h.train("folded", "--dtype", "bfloat16", "--frozen", "fold", "--max-steps", 2, on="style")
    assert folded["frozen"] == "fold"
    for name in ("exact", "half", "folded"):
        tensors = load_file(h.weights(name) / "adapter_model.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}, "the new adapter is always float32"
    bare = h.train("bare", "--max-steps", 2)
    assert bare["frozen"] == "none"


def test_what_is_registered_is_read_back_first(style_and_instruct: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter that was not saved whole, or holds no numbers, is not registered."""

    def saves(change: Any) -> Any:
        def save(model: Any, folder: Path, *rest: Any) -> None:
            write(model, folder, *rest)
            tensors = load_file(folder / "adapter_model.safetensors")
            change(tensors)
            save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})

        return save

    def with_nan(tensors: dict[str, torch.Tensor]) -> None:
        next(iter(tensors.values()))[0, 0] = float("nan")

    write = registering.save_adapter
    for change in (without_one, with_nan):
        monkeypatch.setattr(registering, "save_adapter", saves(change))
        style_and_instruct.train("new", "--max-steps", 1, on="style", code=5)
        assert style_and_instruct.adapters() == {"style", "instruct"}


def test_the_layers_of_raw_peft_agree_about_scaling(style_and_instruct: Any) -> None:
    """The oracle itself: a weight multiplies a member's scaling, and arithmetic by hand gives the same."""
    model = oracle.live(style_and_instruct.base, *style_and_instruct.members(("style", 0.5), ("instruct", -2)))
    by_hand = oracle.load_plain(style_and_instruct.base, torch.float64)
    parts = oracle.added(
        oracle.deltas(style_and_instruct.paths["style"], 0.5), oracle.deltas(style_and_instruct.paths["instruct"], -2)
    )
    for name, delta in parts.items():
        by_hand.get_submodule(name.removeprefix("base_model.model.")).weight.data += delta
    assert oracle.relative(oracle.logits(by_hand), oracle.logits(model), style_and_instruct.live()) < 1e-10


def test_a_plan_with_a_problem_is_not_used(style_and_instruct: Any) -> None:
    plan = dataclasses.replace(
        style_and_instruct.plan("style+instruct"), problems=(Problem("invented", "an invented problem"),)
    )
    stacked = style_and_instruct.load()
    with pytest.raises(StackctlError):
        stacked.use(plan)
    assert torch.equal(oracle.logits(stacked.model), oracle.logits(oracle.load_plain(style_and_instruct.base)))
