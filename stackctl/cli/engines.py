"""Which program computes answers: transformers in this process, or llama.cpp."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

from stackctl.cli.shared_options import BaseOption, of_device
from stackctl.core import Say
from stackctl.core.errors import StackctlError, Usage, gathering, raise_all
from stackctl.core.schema import Base
from stackctl.machine.optional_packages import check_installed, is_installed
from stackctl.registry.base_models import base_gguf, no_gguf
from stackctl.registry.store import Registry

if TYPE_CHECKING:
    from stackctl.engine.generation import AnswerEngine
    from stackctl.engine.serving.requests import Engine

LLAMA_CPP = "llama.cpp"
ENGINE = Annotated[
    Literal["auto", "transformers", "llama.cpp"],
    of_device(
        help="The inference engine. auto is transformers; llama.cpp runs a base that came from a GGUF file as it is, "
        "and its quantised arithmetic may choose other words."
    ),
]
DTYPE = Annotated[Literal["auto", "float32", "bfloat16", "float16"], of_device(help="Precision of the weights.")]
DEVICE = Annotated[Literal["auto", "cpu", "cuda", "mps"], of_device(help="Device to run on.")]


@dataclass(frozen=True)
class BaseOptions:
    """Which base is loaded, how precisely and where to; each field is an option."""

    base: BaseOption = None
    dtype: DTYPE = "auto"
    device: DEVICE = "auto"


@dataclass(frozen=True)
class Computing:
    """By which engine answers are computed, how precisely and where."""

    engine: str = "auto"
    dtype: str = "auto"
    device: str = "auto"

    @property
    def is_llama_cpp(self) -> bool:
        return self.engine == LLAMA_CPP

    @property
    def name(self) -> str:
        """Which one it is: ``auto`` is transformers, whose text is that of ``generate``."""
        return "transformers" if self.engine == "auto" else self.engine

    def check(self) -> None:
        """What the options say of one another; nothing is loaded.

        Raises:
            Usage, Incompatible: an option that llama.cpp has no use for, or it is not installed.
        """
        if not self.is_llama_cpp:
            return
        problems: list[StackctlError] = []
        if self.dtype != "auto":
            what = f"llama.cpp computes with the weights of the GGUF file: --dtype {self.dtype} changes nothing there"
            problems.append(Usage(what, hint="leave out --dtype, or --engine llama.cpp"))
        if self.device not in ("auto", "cpu"):
            what = "llama.cpp uses the devices that it was built for"
            problems.append(Usage(what, hint=f"leave out --device {self.device}; --device cpu keeps it on the CPU"))
        with gathering(problems):
            check_llama_cpp()
        raise_all(problems)

    def load(self, base: Base, registry: Registry, say: Say) -> AnswerEngine:
        """The base, ready to answer.

        Raises:
            NotFound, VerificationFailed, Incompatible: it cannot be loaded.
        """
        if self.is_llama_cpp:
            from stackctl.engine.llama_cpp.loading import load_llama_cpp

            return load_llama_cpp(base, registry, device=self.device, say=say)
        from stackctl.engine.quick_imports import import_transformers

        import_transformers()
        from stackctl.engine.models import load_base

        return load_base(base, registry, dtype=self.dtype, device=self.device, say=say)

    def start(self, base: Base, registry: Registry, say: Say) -> Engine[Any]:
        """The base, ready to answer many requests at once.

        Raises:
            NotFound, VerificationFailed, Incompatible: it cannot be loaded.
        """
        loaded: Any = self.load(base, registry, say)
        if self.is_llama_cpp:
            return cast("Engine[Any]", loaded)
        from stackctl.engine.serving.batching import BatchingEngine

        return BatchingEngine(loaded)


def check_llama_cpp() -> None:
    """Make sure that llama.cpp is there, as a package or as a program.

    Raises:
        Incompatible: it is not.
    """
    import shutil

    if not is_installed("xllamacpp") and shutil.which("llama-server") is None:
        check_installed("xllamacpp")


def check_has_gguf(base: Base, registry: Registry) -> None:
    """Make sure that llama.cpp has a file to run.

    Raises:
        Incompatible, NotFound: the base did not come from a GGUF file, or that is gone.
    """
    if base_gguf(base, registry.root) is None:
        raise no_gguf(base)
