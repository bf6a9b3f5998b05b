"""Import transformers and PEFT without what a command never uses of them: a third of its way to a first token or step.

transformers loads torch's compiler for decorators that tell it what to leave alone, and sharded tensors for models that
are spread over several processes; and it reads the source of all its models, twice, for a table of what they define. A
command is one process, compiles nothing, and reads one model. Processes that train together import everything.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from stackctl.engine.libraries import quiet_libraries, replaced

_COMPILER = "torch._dynamo"
_MARKS = (
    "allow_in_graph", "assume_constant_result", "disable", "disallow_in_graph", "graph_break", "mark_static_address",
)  # fmt: skip
"""What only tells the compiler how to treat a function or a tensor, if it ever compiles."""
_INDEPENDENT = f"{_COMPILER}._trace_wrapped_higher_order_op"
"""A submodule of it that transformers imports, and that uses nothing else of it."""


def import_transformers() -> None:
    """Import what every model of transformers needs, once, quickly and quietly; where it is imported, keep it quiet.

    From then on transformers takes torch for one that was built without ``torch.distributed``, and the package datasets
    for one that is not installed.
    """
    if "transformers" not in sys.modules:
        import torch

        _import_without_models()
        from transformers.utils import import_utils

        with replaced(torch.distributed, "is_available", lambda: False):
            import_utils.is_torch_distributed_available()  # which keeps its answer
        with replaced(import_utils, "_is_package_available", lambda *_, **__: (False, "N/A")):
            import_utils.is_datasets_available()  # Trainer looks whether what it is given is one of them
        if _COMPILER not in sys.modules and (spec := find_spec(_COMPILER)):
            sys.modules[_COMPILER] = _CompilerLater(spec)
            sys.meta_path.insert(0, _PartsLater())
    quiet_libraries()


def import_peft() -> None:
    """Import PEFT, and bitsandbytes, which comes with it, without setting up the compiler for functions of that.

    It has torch compile some for devices without kernels of its own; here each is compiled when it is first called.
    From then on PEFT and accelerate take torch for one that was built without ``torch.distributed``.
    """
    if "peft" in sys.modules:
        return
    import torch

    compile_ = torch.compile

    def later(function: Callable[..., Any] | None = None, **options: Any) -> Callable[..., Any]:
        if function is None:
            return functools.partial(later, **options)
        compiled = functools.cache(lambda: compile_(function, **options))
        return lambda *args, **kwargs: compiled()(*args, **kwargs)

    with replaced(torch, "compile", later), replaced(torch.distributed, "is_available", lambda: False):
        import peft  # noqa: F401


def _import_without_models() -> None:
    """``import transformers`` with a table of names that lacks those of single models.

    It is completed when a name is asked for that is not in it. ``transformers.models``, which makes the same table once
    more, becomes the package alone: a model's package is imported when it is asked for.
    """
    spec = find_spec("transformers")
    if spec is None or spec.loader is None:
        return
    package = module_from_spec(spec)
    vars(package)["__version__"] = metadata.version("transformers")  # all that its submodules ask of it meanwhile
    sys.modules["transformers"] = package
    from transformers import utils
    from transformers.utils import import_utils

    tables = import_utils.define_import_structure
    folder = Path(package.__path__[0])
    models = folder / "models"
    found = {frozenset[str](): {}, **tables(str(models / "auto"), prefix="models.auto")}  # finds the class of a model
    with replaced(import_utils, "define_import_structure", lambda *_, **__: found):
        spec.loader.exec_module(package)
    whole = sys.modules["transformers"]
    kind: Any = type(whole)

    def complete() -> None:
        table = tables(str(models), prefix="models")
        names = table.setdefault(frozenset(), {})
        names.update({key: value for key, value in found[frozenset()].items() if key not in names})
        made = kind(whole.__name__, whole.__file__, table, whole.__spec__)
        whole.__class__ = kind
        kept = ("__all__", "_class_to_module", "_import_structure", "_modules", "_object_missing_backend")
        vars(whole).update({name: vars(made)[name] for name in kept})

    class TableLater(kind):  # type: ignore[misc]
        def __getattr__(self, name: str) -> Any:
            if name != "__all__" and (
                name in self._class_to_module
                or name in self._modules
                or name in self._objects
                or name.startswith("__")  # looked for in every module by some libraries
                or (folder / f"{name}.py").is_file()  # a submodule that is in no table
            ):
                return super().__getattr__(name)
            complete()
            return getattr(self, name)

    vars(utils)["direct_transformers_import"] = lambda *_, **__: whole  # else it runs again, as another module
    del whole.__all__
    whole.__class__ = TableLater
    _add_models(whole)


def _add_models(transformers: ModuleType) -> None:
    name = "transformers.models"
    if (spec := find_spec(name)) is None:
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
        if sys.modules.get(_COMPILER) is not self:
            return getattr(_compiler(), name)
        if name == "eval_frame":
            return _FramesLater(name)
        return _leave if name in _MARKS else getattr(_compiler(), name)


class _FramesLater(ModuleType):
    """Stands for the compiler's module of what it compiled, of which there is nothing yet."""

    OptimizedModule = type("OptimizedModule", (), {})
    """The class that accelerate looks for in every model."""

    def __getattr__(self, name: str) -> Any:
        return getattr(_compiler().eval_frame, name)


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
