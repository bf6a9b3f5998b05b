"""Loading a base in another precision than that of its files."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tiny import random_adapter, tiny_tokenizer
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.initialization import no_init_weights

from stackctl.engine.models import load_base
from stackctl.registry.base_entries import resolve_base
from stackctl.registry.planning import read_plan
from stackctl.registry.resolve import resolve_expression
from stackctl.registry.store import Registry


@pytest.mark.parametrize("name", ["llama", "tied", "gpt2", "mixtral"])
def test_a_converted_base_is_what_transformers_makes_of_it(tiny_registry: Any, name: str) -> None:
    h = tiny_registry(name)
    wanted = AutoModelForCausalLM.from_pretrained(h.base, dtype=torch.bfloat16)
    found = h.load("bfloat16").model
    assert type(found) is type(wanted)
    assert {n: t.dtype for n, t in found.state_dict().items()} == {n: t.dtype for n, t in wanted.state_dict().items()}
    assert all(torch.equal(tensor, wanted.state_dict()[name]) for name, tensor in found.state_dict().items())
    assert (found.get_output_embeddings().weight is found.get_input_embeddings().weight) == (name in ("tied", "gpt2"))
    assert found.config.to_dict() == wanted.config.to_dict()
    assert found.generation_config.to_dict() == wanted.generation_config.to_dict()


def test_it_knows_every_token_that_ends_an_answer(run: Any, models: Any, tmp_path: Path) -> None:
    """A base that names several in its generation settings, as Llama 3 does, keeps them."""
    folder = tmp_path / "model"
    AutoModelForCausalLM.from_pretrained(models("llama")).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    GenerationConfig(eos_token_id=[257, 10]).save_pretrained(folder)
    run("init")
    run("base", "add", "other", folder)
    registry = Registry(tmp_path / "registry")
    assert load_base(
        resolve_base(registry, "other"), registry, dtype="bfloat16"
    ).model.generation_config.eos_token_id == [
        257,
        10,
    ]


@pytest.mark.parametrize("named", [False, True], ids=["beside one file", "named by the configuration"])
def test_weights_are_read_where_transformers_reads_them(run: Any, models: Any, tmp_path: Path, named: bool) -> None:
    """Of two sets of weights in a folder one was computed with, and the other put back, converted, or exported."""
    folder, other = tmp_path / "model", AutoModelForCausalLM.from_pretrained(models("llama", seed=7))
    other.save_pretrained(folder, max_shard_size="60KB")
    tiny_tokenizer().save_pretrained(folder)
    shutil.copy(models("llama") / "model.safetensors", folder / "model.safetensors")
    if named:
        config = json.loads((folder / "config.json").read_text())
        config["transformers_weights"] = "model.safetensors.index.json"
        (folder / "config.json").write_text(json.dumps(config))
    wanted = other if named else AutoModelForCausalLM.from_pretrained(models("llama"))
    run("init")
    run("base", "add", "other", folder)
    run("add", "x", random_adapter(models("llama"), tmp_path / "x"), "--base", "other")
    registry = Registry(tmp_path / "registry")
    stacked = load_base(resolve_base(registry, "other"), registry)
    stacked.use(read_plan(registry, resolve_expression(registry, "x")))
    stacked.restore()
    for dtype, found in (("float32", stacked.model), ("bfloat16", _load(registry, "bfloat16"))):
        state = wanted.to(getattr(torch, dtype)).state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in found.state_dict().items()), dtype
    _check_export(run, folder)


def _check_export(run: Any, folder: Path) -> None:
    """What is written without any change is the model that transformers reads in the base's folder."""
    run("export", "x:0", "--format", "model", "--out", folder.parent / "whole")
    whole = AutoModelForCausalLM.from_pretrained(folder.parent / "whole")
    kept = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in whole.state_dict().items())


@pytest.mark.parametrize("by_index", [True, False])
def test_a_base_of_one_file_of_another_name_is_exported_so_that_it_is_found(
    run: Any, models: Any, tmp_path: Path, by_index: bool
) -> None:
    """``model-00001-of-00001.safetensors`` was written without its index, and transformers found no weights."""
    folder, name = tmp_path / "model", "model-00001-of-00001.safetensors"
    shutil.copytree(models("llama"), folder)
    (folder / "model.safetensors").rename(folder / name)
    if by_index:
        with safe_open(folder / name, "pt") as file:
            index = {"metadata": {}, "weight_map": dict.fromkeys(file.keys(), name)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "transformers_weights": name}))
    run("init")
    run("base", "add", "other", folder)
    run("add", "x", random_adapter(models("llama"), tmp_path / "x"), "--base", "other")
    _check_export(run, folder)


def _load(registry: Registry, dtype: str) -> Any:
    return load_base(resolve_base(registry, "other"), registry, dtype=dtype).model


WORK = """
import os
import sys
from pathlib import Path
from stackctl.engine.generation import Sampling, generate_reply
from stackctl.engine.models import load_base
from stackctl.engine.records.prompt_files import Prompt
from stackctl.machine.resources import return_freed_memory
from stackctl.registry.planning import read_plan
from stackctl.registry.resolve import resolve_base, resolve_expression
from stackctl.registry.store import Registry

registry = Registry(Path(sys.argv[1]))

def megabytes(what):
    return int(Path("/proc/self/status").read_text().partition(what)[2].split()[0]) / 1024

def work(base, dtype):
    adapters = "little-" if base == "little" else ""
    stacked = load_base(resolve_base(registry, base), registry, dtype=dtype)
    stacked.use(read_plan(registry, resolve_expression(registry, f"{adapters}one+{adapters}two")))
    generate_reply(stacked, Prompt("Hi"), Sampling(max_new_tokens=4, raw=True), lambda _: None)
    return {p.data_ptr(): p.numel() * p.element_size() for p in stacked.model.parameters()}

work("little", "bfloat16")  # so that what is imported once is there
for case in sys.argv[2:]:
    if not os.fork():  # what one leaves free would be there for the next
        work("little", case.split()[1])  # a fork shares the libraries, but touched none of them yet
        return_freed_memory()
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins again at what there is now
        before = megabytes("VmRSS:")
        own = [size / 2**20 for size in work(*case.split()).values()]
        print(case, (megabytes("VmHWM:") - before) / sum(own), max(own) / sum(own), flush=True)
        os._exit(0)
    assert os.wait()[1] == 0
"""
"""The work of ``generate``; the peak above what there was before it and the largest weight, as parts of the weights."""


Peaks = dict[str, tuple[float, float]]


def peaks(registry: Path, cases: list[str], fits: Callable[[Peaks], bool], **environment: str) -> Peaks:
    """By case, once more where it does not fit: what an allocator keeps differs by a part in a hundred.

    One thread: a process that has started OpenMP's threads hangs in a fork.
    """
    once = _measured_peaks(registry, cases, environment)
    if fits(once):
        return once
    again = _measured_peaks(registry, cases, environment)
    return {case: min(once[case], again[case]) for case in cases}


def _measured_peaks(registry: Path, cases: list[str], environment: dict[str, str]) -> Peaks:
    command = [sys.executable, "-c", WORK, str(registry), *cases]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120, env=environment)
    found = {" ".join(line.split()[:2]): line.split()[2:] for line in done.stdout.splitlines()}
    assert list(found) == cases
    return {case: (float(peak), float(largest)) for case, (peak, largest) in found.items()}


def test_the_peak_is_hardly_more_than_the_weights(run: Any, tmp_path: Path) -> None:
    """Not also the file, a large tensor twice, or what the allocator keeps; whatever is converted into what."""
    large = {"hidden_size": 640, "intermediate_size": 1536, "num_hidden_layers": 6, "vocab_size": 49152}
    little = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 260}
    made = {
        "tied": (large, torch.float32, "10GB"),
        "untied": (large, torch.float32, "100MB"),
        "half": (large, torch.bfloat16, "10GB"),
        "little": (little, torch.float32, "10GB"),
    }
    run("init")
    for name, (sizes, dtype, shard) in made.items():
        config = LlamaConfig(**sizes, num_attention_heads=4, bos_token_id=256, eos_token_id=257)
        config.tie_word_embeddings = name == "tied"
        with no_init_weights():  # they would be drawn twice
            model = LlamaForCausalLM(config)
        model.tie_weights()
        for parameter in model.parameters():
            parameter.data.uniform_(-0.03, 0.03)
        model.to(dtype).save_pretrained(tmp_path / name, max_shard_size=shard)
        tiny_tokenizer().save_pretrained(tmp_path / name)
        run("base", "add", name, tmp_path / name)
    for number, (base, name) in enumerate(itertools.product(("tied", "little"), ("one", "two"))):
        adapter = name if base == "tied" else f"{base}-{name}"
        run("add", adapter, random_adapter(tmp_path / base, tmp_path / adapter, seed=number), "--base", base)
    cases = ["tied bfloat16", "untied bfloat16", "half float32", "tied float32"]

    def no_second_copy(found: Peaks) -> bool:
        return all(peak < 1.15 for peak, _ in found.values())

    def no_more_than_the_order_of_registers(found: Peaks) -> bool:
        return all(0.95 < peak < 1.15 + largest for peak, largest in found.values())

    found = peaks(tmp_path / "registry", cases, no_second_copy, ONEDNN_MAX_CPU_ISA="AVX2")
    assert no_second_copy(found), found
    assert min(peak for peak, _ in found.values()) > 0.95, f"the weights must be among what was measured: {found}"
    # Where a CPU multiplies bfloat16 in hardware, oneDNN multiplies by a copy that has the order of its registers.
    native = peaks(tmp_path / "registry", cases[:2], no_more_than_the_order_of_registers)
    assert no_more_than_the_order_of_registers(native), native
