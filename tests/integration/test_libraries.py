"""What commands import and what of it is heard."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from stackctl.engine.base.tokenizer import load_tokenizer

CODE = """
import sys
from pathlib import Path
from stackctl.engine.quick_imports import import_peft, import_transformers
import_transformers()
import torch, transformers
from stackctl.engine.base.loading import load_weights
import stackctl.engine.loss.segment_attention, stackctl.engine.generation.transformers_answers
model = load_weights(Path(sys.argv[1]), torch.float32, torch.device("cpu"))
with torch.no_grad():
    torch.save(model(input_ids=torch.arange(6)[None]).logits, sys.argv[2])
assert "sympy" not in sys.modules
assert not transformers.utils.is_torch_distributed_available() and torch.distributed.is_available()

assert "BertConfig" not in transformers._class_to_module and not hasattr(transformers, "__wrapped__")
assert "BertConfig" not in transformers._class_to_module, "the table was made for a name that nothing has"
assert transformers.BertConfig.model_type == "bert" and "BertConfig" in transformers._class_to_module
assert not hasattr(transformers, "no_such_name") and transformers.BertTokenizerFast
from transformers.models import LlamaConfig, llama
assert LlamaConfig is transformers.LlamaConfig is llama.LlamaConfig
assert transformers.models.gpt2.GPT2Config is transformers.GPT2Config
assert not hasattr(transformers.models, "no_such_model")

import_peft()
import bitsandbytes, peft
peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["q_proj"]), model)
loaded = {"torch._dynamo.convert_frame", "torch._inductor.compile_fx", "torch.distributed.tensor"} & set(sys.modules)
assert not loaded, loaded

import torch._dynamo.utils  # whatever is asked for first, it is the real one, once
assert torch._dynamo.utils is sys.modules["torch._dynamo.utils"] and torch._dynamo is sys.modules["torch._dynamo"]
assert torch._dynamo.disable is torch._dynamo.decorators.disable
compiled = torch.compile(lambda x: x + 1, backend="eager")
print(*dir(transformers))
assert compiled(torch.ones(2)).tolist() == [2, 2] and torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
"""


def test_a_model_is_read_and_peft_imported_without_the_compiler_and_sharded_tensors(
    tiny_registry: Any, tmp_path: Path
) -> None:
    base, logits = tiny_registry("llama").base, tmp_path / "logits"
    command = [sys.executable, "-c", CODE, str(base), str(logits)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert not set(transformers.__all__) - set(done.stdout.split())
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(base)(input_ids=torch.arange(6)[None]).logits
    assert torch.equal(torch.load(logits), expected)


TRAINED = """
import sys
from stackctl.cli import main
try:
    main()
finally:
    unwanted = {"torch._dynamo.convert_frame", "torch._inductor.compile_fx", "datasets", "pandas"} & set(sys.modules)
    assert not unwanted, unwanted
"""


def test_a_training_without_the_compiler_is_that_of_one_that_imported_everything(h: Any) -> None:
    h.add("style", seed=1)
    options = ["--on", "style", "--data", h.data(), "--max-steps", "2", "--rank", "2"]
    h.run("train", "here", *options)
    command = [sys.executable, "-c", TRAINED, "train", "alone", *map(str, options), "-q"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=h.folder)
    assert (done.returncode, done.stdout) == (0, "alone@1\n"), done.stderr
    here, alone = (load_file(h.weights(name) / "adapter_model.safetensors") for name in ("here", "alone"))
    assert here.keys() == alone.keys()
    for name, weight in here.items():
        torch.testing.assert_close(alone[name], weight, rtol=1e-5, atol=1e-7)


def test_what_native_code_prints_is_not_on_stdout(
    models: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Where it would stand before a command's JSON."""
    base = Path(shutil.copytree(models("llama"), tmp_path / "base"))
    read = json.loads((base / "tokenizer.json").read_text())
    read["added_tokens"][0]["another"] = 1
    (base / "tokenizer.json").write_text(json.dumps(read))
    assert load_tokenizer(base)("a").input_ids
    print("behind it")
    said = capfd.readouterr()
    assert said.out == "behind it\n" and "another" in said.err
