"""Import transformers without what a command that only reads models never uses: a third of its way to a first token.

transformers loads torch's compiler for decorators that tell it what to leave alone, and sharded tensors for models that
are spread over several processes; and it reads the source of all its models twice. A command that reads a model is one
process, and compiles nothing. Training is left alone: Trainer and accelerate may use all of it.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, module_from_spec
from types import ModuleType
from typing import Any

from stackctl.engine.replaced import replaced

_COMPILER = "torch._dynamo"
_MARKS = ("allow_in_graph", "assume_constant_result", "disable", "disallow_in_graph", "mark_static_address")
"""What only tells the compiler how to treat a function or a tensor, if it ever compiles."""
_INDEPENDENT = f"{_COMPILER}._trace_wrapped_higher_order_op"
"""A submodule of it that transformers imports, and that uses nothing else of it."""


def import_transformers() -> None:
    """Import what every model of transformers needs, once, quickly and quietly; where it is imported, keep it quiet.

    From then on transformers takes torch for one that was built without ``torch.distributed``.
    """
    if "transformers" not in sys.modules:
        import torch
        from transformers.utils.import_utils import is_torch_distributed_available

        with replaced(torch.distributed, "is_available", lambda: False):
            is_torch_distributed_available()  # which keeps its answer
        _add_models()
        if _COMPILER not in sys.modules and (spec := find_spec(_COMPILER)):
            sys.modules[_COMPILER] = _CompilerLater(spec)
            sys.meta_path.insert(0, _PartsLater())
    quiet_libraries()


def quiet_libraries() -> None:
    """Keep other people's bars and advice off stderr; ours says what matters."""
    from transformers.utils import logging as hf_logging

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if hf_logging.get_verbosity() != logging.ERROR:  # setting it makes every logger forget what it knows
        hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module=r"(peft|transformers|torch|accelerate)(\.|$)")


@contextlib.contextmanager
def off_stdout() -> Iterator[None]:
    """What is printed in the body goes to stderr, by code that is not Python, too: stdout has the command's results."""
    shown = sys.stdout
    shown.flush()
    before = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        shown.flush()
        os.dup2(before, 1)
        os.close(before)


def _add_models() -> None:
    """The package ``transformers.models`` without its table of what each model's files define, which ``transformers``
    has as well: a model's package is imported when it is asked for."""
    import transformers

    name = "transformers.models"
    spec = find_spec(name)
    if spec is None or name in sys.modules:
        return
    models = module_from_spec(spec)

    def find(wanted: str) -> Any:
        try:
            return importlib.import_module(f"{name}.{wanted}")
        except ModuleNotFoundError:
            return getattr(transformers, wanted)

    vars(models)["__getattr__"] = find
    sys.modules[name] = vars(transformers)["models"] = models


class _CompilerLater(ModuleType):
    """Stands for the compiler until more is asked of it than its marks, which leave things as they are."""

    def __init__(self, spec: ModuleSpec) -> None:
        super().__init__(spec.name)
        self.__spec__, self.__path__ = spec, list(spec.submodule_search_locations or ())

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # looked for in every module by some libraries
            raise AttributeError(name)
        return _leave if name in _MARKS and sys.modules.get(_COMPILER) is self else getattr(_compiler(), name)


class _PartsLater(MetaPathFinder, Loader):
    """Finds submodules of the compiler, which come with it."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """The place of a submodule that was loaded with the compiler just now; None for anything else."""
        if not name.startswith(f"{_COMPILER}.") or name == _INDEPENDENT:
            return None
        _compiler()
        loaded = sys.modules.get(name)
        if loaded is None:
            return None
        loaded.__spec__ = ModuleSpec(name, self, loader_state=loaded.__spec__)  # importlib would take its own
        return loaded.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """The submodule as it is loaded."""
        return sys.modules[spec.name]

    def exec_module(self, module: ModuleType) -> None:
        """It ran when it was loaded; give it back its place."""
        if module.__spec__:
            module.__spec__ = module.__spec__.loader_state


def _compiler() -> ModuleType:
    """The compiler itself, in the place of what stood for it."""
    if isinstance(sys.modules.get(_COMPILER), _CompilerLater):
        sys.modules.pop(_COMPILER, None)
        sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _PartsLater)]
    return importlib.import_module(_COMPILER)


def _leave(thing: Any = None, *_: Any, **__: Any) -> Any:
    return _leave if thing is None else thing  # of a decorator's options there is no thing yet
