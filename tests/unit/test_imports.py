"""The light floor stays light: in a process of its own, its modules import nothing heavy.

Which room may import which, and which library, is in pyproject.toml: import-linter's contracts and ruff's
``banned-module-level-imports``.
"""

import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import make_registry, register

import stackctl

HEAVY = {
    "accelerate", "datasets", "gguf", "huggingface_hub", "jinja2", "numpy", "pandas", "peft", "prompt_toolkit",
    "safetensors", "tokenizers", "torch", "transformers",
}  # fmt: skip
ROOT = Path(stackctl.__file__).parent
LIGHT = sorted(
    module.name
    for module in pkgutil.walk_packages([str(ROOT)], "stackctl.")
    if not module.name.startswith(("stackctl.engine", "stackctl.__main__"))
)


def test_the_light_floor_imports_nothing_heavy():
    assert "stackctl.core.errors" in LIGHT
    program = f"import importlib, sys\nfor name in {LIGHT!r}:\n  importlib.import_module(name)\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert not loaded & HEAVY
    assert "stackctl.engine" not in done.stdout.split()


@pytest.mark.parametrize(
    ("words", "unneeded"),
    [
        (["ls"], ["stackctl.plan.stack_plan", "stackctl.lora.checkpoint", "stackctl.registry.resolve", "socket"]),
        (["ls", "-q"], ["rich", "stackctl.plan.stack_plan", "stackctl.lora.checkpoint"]),
        (["rm", "sty"], ["rich", "stackctl.registry.resolve", "yaml"]),
    ],
    ids=["ls", "ls -q", "completing"],
)
def test_what_a_quick_command_does_not_need_it_does_not_import(tmp_path, words, unneeded):
    registry = make_registry(tmp_path / "registry")
    register(registry, "style")
    environment = {"STACKCTL_REGISTRY": str(registry.root), "STACKCTL_CACHE": str(tmp_path), "PATH": os.environ["PATH"]}
    if words[-1] == "sty":
        environment |= {"_STACKCTL_COMPLETE": "complete_bash", "COMP_WORDS": "stackctl rm sty", "COMP_CWORD": "2"}
        words = []
    program = (
        "import atexit, sys\natexit.register(lambda: print(*sys.modules, file=sys.stderr))\n"
        f"sys.argv = ['stackctl', *{words!r}]\nfrom stackctl.cli import main\nmain()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, env=environment)
    assert (done.returncode, "style" in done.stdout) == (0, True), done.stderr
    assert not set(unneeded) & set(done.stderr.split())


def test_what_answers_by_llama_cpp_is_imported_without_tensor_libraries():
    """They take seconds, and the first token is to come within one."""
    names = [
        "stackctl.engine.llama_cpp",
        "stackctl.engine.generation",
        "stackctl.engine.serving.requests",
        "stackctl.engine.data.chat_template",
        "stackctl.engine.data.turns",
    ]
    program = f"import importlib, sys\nfor name in {names!r}:\n  importlib.import_module(name)\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert not {name.partition(".")[0] for name in done.stdout.split()} & (HEAVY - {"jinja2"})
