"""The light floor stays light: in a process of its own, each of its modules imports nothing heavy."""

import ast
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
# From the bottom up, as the design's table has it: a module imports only what stands above it here.
ORDER = ["core", "storage", "lora", "plan", "registry"]


def test_there_are_light_modules():
    assert {f"stackctl.{name}" for name in ORDER} <= set(LIGHT)


def test_the_light_floor_imports_nothing_heavy():
    """One process for all; only when it fails does the next test's message say which module it was."""
    program = f"import importlib, sys\nfor name in {LIGHT!r}:\n  importlib.import_module(name)\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert not loaded & HEAVY
    assert "stackctl.engine" not in done.stdout.split()


def imports_at_module_level(path):
    """Modules that running a file's top level imports; not what stands in functions or under TYPE_CHECKING."""
    found = set()
    pending = list(ast.parse(path.read_text(encoding="utf-8")).body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending += node.orelse
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            pending += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]
    return found


@pytest.mark.parametrize("name", LIGHT)
def test_no_light_module_names_a_heavy_one_at_its_top(name):
    path = ROOT.joinpath(*name.split(".")[1:])
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    found = imports_at_module_level(path)
    assert not {module for module in found if module.partition(".")[0] in HEAVY}
    assert not {module for module in found if module.startswith("stackctl.engine")}


@pytest.mark.parametrize("name", ORDER)
def test_imports_point_one_way(name):
    below = {f"stackctl.{other}" for other in ORDER[ORDER.index(name) :]}
    place = ROOT / name
    files = [*place.glob("*.py")] if place.is_dir() else [place.with_suffix(".py")]
    found = set().union(*map(imports_at_module_level, files))
    assert not {m for m in found if any(m == b or m.startswith(f"{b}.") for b in below - {f"stackctl.{name}"})}
    assert not {module for module in found if module.startswith("stackctl.cli")}


def test_nobody_imports_click():
    for path in ROOT.rglob("*.py"):
        assert not {m for m in imports_at_module_level(path) if m.partition(".")[0] == "click"}, path


@pytest.mark.parametrize(
    ("words", "unneeded"),
    [
        (["ls"], ["stackctl.plan.model", "stackctl.lora.checkpoint", "stackctl.registry.resolve", "socket"]),
        (["ls", "-q"], ["rich", "stackctl.plan.model", "stackctl.lora.checkpoint"]),
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
