"""The ways to compose a stack, as data: what each is called, takes, and where its function stands.

A method is a small pure function in :mod:`stackctl.engine.algebra` or :mod:`stackctl.engine.aligned_merging`; this
table is what ``compose --method`` lists, and costs no torch. ``sum`` is exact; every other one is an approximation or
a different thing on purpose, and its distance from the exact sum is measured. What ``compose --method best`` tries
beside the sum, every method with a few settings, stands here as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from stackctl.core.errors import Usage, did_you_mean
from stackctl.core.expressions import format_expression, format_weight
from stackctl.core.schema import MethodOptions, Stack

SUM = "sum"
BEST = "best"
"""What the choice among all methods, by data, is called in the place of one; see :func:`candidates`."""


@dataclass(frozen=True, slots=True)
class Method:
    """One way to compose. ``function`` is its module and name in the engine; ``options`` what it takes."""

    about: str
    function: str
    options: tuple[str, ...] = ()
    low_rank: bool = False
    """Its result is a pair of factors; of the others it is a full matrix."""
    densities: tuple[float, ...] = ()
    """What ``best`` tries of the share that stays: of the papers' own searches, few."""
    averages: bool = False
    """Where members do not meet, each is left at one nth, so that ``best`` tries n times the weights as well."""


METHODS = {
    SUM: Method("the exact sum of the deltas", "algebra.concatenate", low_rank=True),
    "svd": Method(
        "the sum, cut to a rank where that loses least", "algebra.truncate", ("rank", "tolerance"), low_rank=True
    ),
    "ties": Method(
        "trim, elect signs, average what agrees", "algebra.ties", ("density", "rank"),
        densities=(0.2, 0.5, 1.0), averages=True,
    ),
    "dare_linear": Method(
        "drop entries at random, rescale the rest, add", "algebra.dare_linear", ("density", "seed", "rank"),
        densities=(0.5, 0.8),
    ),
    "dare_ties": Method(
        "drop entries at random, then elect signs", "algebra.dare_ties", ("density", "seed", "rank"),
        densities=(0.5, 0.8), averages=True,
    ),
    "magnitude_prune": Method(
        "keep the largest entries of each delta, add", "algebra.magnitude_prune", ("density", "rank"),
        densities=(0.2, 0.5),
    ),
    "knots_ties": Method(
        "ties on members aligned by KnOTS", "aligned_merging.knots_ties", ("density", "rank"), low_rank=True,
        densities=(0.2, 0.5, 1.0), averages=True,
    ),
    "tsv": Method(
        "singular vectors of all, made orthogonal to one another", "aligned_merging.tsv", ("rank",), low_rank=True
    ),
    "iso_c": Method("the sum, all its singular values their mean", "aligned_merging.iso_c", ("rank",), low_rank=True),
    "core_ties": Method(
        "ties in core space", "aligned_merging.core_ties", ("density", "rank"), low_rank=True,
        densities=(0.2, 0.5, 1.0), averages=True,
    ),
}  # fmt: skip

DEFAULTS: dict[str, float | int] = {"density": 0.5, "seed": 0}


def check_method(name: str, options: MethodOptions) -> MethodOptions:
    """A method's options with its defaults filled in.

    Raises:
        Usage: there is no such method, or it does not take (or lacks) one of the options.
    """
    method = METHODS.get(name)
    if method is None:
        raise Usage(
            f"there is no method '{name}'", hint=did_you_mean(name, [*METHODS, BEST], f"one of {', '.join(METHODS)}")
        )
    values = {key: getattr(options, key) for key in MethodOptions.__struct_fields__}
    extra = [f"--{key}" for key, value in values.items() if value is not None and key not in method.options]
    if extra:
        takes = ", ".join(f"--{key}" for key in method.options) or "no options"
        raise Usage(f"--method {name} does not take {', '.join(extra)}", hint=f"it takes {takes}")
    for key in method.options:
        if values[key] is None and key in DEFAULTS:
            values[key] = DEFAULTS[key]
    if values["rank"] == "auto" and "tolerance" not in method.options:
        raise Usage(f"--method {name} takes no --rank auto", hint="--rank 32")
    if name == "svd":
        if values["rank"] is None:
            raise Usage("--method svd needs a rank", hint="--rank 32, or --rank auto --tolerance 0.01")
        if (values["rank"] == "auto") != (values["tolerance"] is not None):
            raise Usage("--rank auto and --tolerance belong together", hint="--rank auto --tolerance 0.01")
    return MethodOptions(**values)


def compose_command(stack: Stack, name: str) -> str | None:
    """What composes a stack's versions, weights and method again; None where no expression says them: by layer."""
    if any(member.layer_weights for member in stack.members):
        return None
    said = [] if stack.method == SUM else ["--method", stack.method]
    for key in MethodOptions.__struct_fields__:
        if (value := getattr(stack.options, key)) is not None:
            said += [f"--{key}", str(value)]
    return " ".join(["stackctl compose", format_expression(stack.members), *said, "--name", name])


@dataclass(frozen=True)
class Candidate:
    """A method with its options; every member's weights are multiplied by ``scale``."""

    method: str
    options: MethodOptions
    scale: float = 1.0

    @property
    def settings(self) -> str:
        """In words, without the seed, which all have in common."""
        said = [f"{key} {getattr(self.options, key)}" for key in ("rank", "density") if getattr(self.options, key)]
        return ", ".join([*said, *([f"weights × {format_weight(self.scale)}"] if self.scale != 1 else [])])


def candidates(members: int, rank: int, seed: int) -> list[Candidate]:
    """Every method but the sum, with a few settings.

    Args:
        members: how many have a weight other than zero.
        rank: that of their sum; half of it is what ``svd`` is cut to.
    """
    return [
        Candidate(name, options, scale)
        for name, method in METHODS.items()
        if name != SUM
        for options in _settings(name, rank, seed)
        for scale in ((1.0, float(members)) if method.averages and members > 1 else (1.0,))
    ]


def _settings(name: str, rank: int, seed: int) -> Iterator[MethodOptions]:
    method = METHODS[name]
    own = {"seed": seed} if "seed" in method.options else {}
    if name == "svd":
        if rank > 1:
            yield MethodOptions(rank=rank // 2)
        return
    for density in method.densities or (None,):
        yield check_method(name, MethodOptions(density=density, **own))
