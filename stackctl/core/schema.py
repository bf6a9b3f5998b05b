"""The typed shape of every registry entry and of what lies in a checkpoint; no I/O.

Keys that PEFT and the Hub use are used verbatim (``r``, ``lora_alpha``). Unknown keys are errors. What training takes
stands in :mod:`stackctl.core.train_job`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from stackctl.core.expressions import format_term
from stackctl.core.fields import Count, Entry, Finite, Part, Scalar
from stackctl.core.provenance import Converted, DataSource, Distilled, EntryProblem, Extracted, HubSource, Moved, Run

_Setting = Scalar | list[str] | dict[str, Scalar] | None


class Defaults(Part, frozen=True, kw_only=True):
    base: str | None = None


class RegistryFile(Entry, frozen=True, kw_only=True):
    """``registry.yaml``: which stack and which base are meant when none is named."""

    current: str | None = None
    defaults: Defaults = msgspec.field(default_factory=Defaults)


class ModuleShape(Part, frozen=True, kw_only=True):
    """One kind of module of a base, of which there may be many.

    ``shape`` is that of its delta: (out, in) for Linear and Conv1D (whose weight is stored transposed), (vocabulary,
    dimension) for Embedding. Experts of a mixture are one parameter of shape (experts, out, in); TransposedExperts are
    stored (experts, in, out). Matrix is a weight (out, in) that no plain linear layer applies, a router's for one; a
    weight that is Shared stands in several modules. Parameter, with the parameter's own shape, is what entries of
    stackctl 0.1 say of experts.
    """

    type: Literal[
        "Linear", "Conv1D", "Embedding", "Experts", "TransposedExperts", "Matrix", "Shared", "Parameter", "Other"
    ]
    shape: list[Count]


class WholeClass(Part, frozen=True, kw_only=True):
    """The class that a base's configuration names, where it was loaded as the class of its text: what the decoder and
    the output embedding are called in it.
    """

    architecture: str
    decoder: str
    head: str | None = None


class Proof(Part, frozen=True, kw_only=True):
    """That a base as it is loaded here computes what transformers of that version loads by itself.

    ``difference`` is the largest of their logits in float32, as a share of the largest logit.
    """

    transformers: str
    difference: Finite


class Base(Entry, frozen=True, kw_only=True):
    """``bases/NAME.yaml``: a base model, recognised by its fingerprint.

    ``path`` is None for what lives in a cache (a wheel, a GGUF, a Hub snapshot). ``tokenizer`` is None where the
    tokenizer's files are made here (out of a GGUF), and in entries of stackctl 0.1 before there was such a field.
    ``quantization`` is transformers' name of the scheme that the weights are stored in, and ``dtype`` then the one that
    they are computed in. ``modules`` maps names, with ranges as in ``model.layers.{0-29}.self_attn.q_proj``, to what a
    LoRA can stand on.
    ``untrained_tokens`` are those of its chat template whose rows are as they were initialised.
    ``former_names`` maps them, with ``*`` for each number, to what they were called by earlier transformers, see
    :mod:`stackctl.lora.naming`. ``converted_names`` are last names of linear layers that PEFT adapts as
    parameters only, see :mod:`stackctl.lora.target_parameters`. ``unread_names`` are those of modules, with ``*`` for
    each number, that PEFT renames when it loads an adapter, so that it does not find the LoRA on them. ``rows_apart``
    says of a tied pair that PEFT leaves trained rows of the embedding out of the head.
    """

    name: str
    kind: Literal["wheel", "gguf", "folder", "hub"]
    source: str
    revision: str | None = None
    fingerprint: str
    path: str | None = None
    hub_id: str | None = None
    architecture: str
    parameters: Count
    dtype: str
    quantization: str | None = None
    vocabulary_size: Count
    context_length: Annotated[int, Meta(ge=-1, le=2**63 - 1)] | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Scalar] | None = None
    tokenizer: str | None = None
    tied_embeddings: bool = False
    rows_apart: bool = False
    input_embedding: str | None = None
    output_embedding: str | None = None
    whole: WholeClass | None = None
    untrained_tokens: list[str] = msgspec.field(default_factory=list)
    proved: Proof | None = None
    former_names: dict[str, list[str]] = msgspec.field(default_factory=dict)
    converted_names: list[str] = msgspec.field(default_factory=list)
    unread_names: list[str] = msgspec.field(default_factory=list)
    modules: dict[str, ModuleShape]

    def __post_init__(self) -> None:
        if self.context_length is not None and self.context_length < 1:  # -1 of XLNet, as entries once had it
            msgspec.structs.force_setattr(self, "context_length", None)

    @property
    def ties_rows(self) -> bool:
        """Whether rows of single tokens that PEFT trained in the embedding are those of the head as well."""
        return self.tied_embeddings and not self.rows_apart


class Lora(Part, frozen=True, kw_only=True):
    """The keys of PEFT's LoraConfig that say what an adapter is."""

    r: Count
    lora_alpha: Finite
    target_modules: list[str] | str | None = None
    rank_pattern: dict[str, Count] = msgspec.field(default_factory=dict)
    alpha_pattern: dict[str, Finite] = msgspec.field(default_factory=dict)
    use_rslora: bool = False
    use_dora: bool = False
    trainable_token_indices: list[Count] | dict[str, list[Count]] | None = None


class AdapterVersion(Part, frozen=True, kw_only=True):
    """One immutable version of an adapter. ``trained_on`` are terms of an expression, pinned: ``style@1:0.7``.

    ``from`` is the version at whose factors its training began, ``moved`` what was found where that stood elsewhere;
    ``trained_tokens`` are those whose rows it has trained; ``distilled`` says by whom it was taught;
    ``hub`` is where it was pulled from, and ``pushed`` where it was pushed to last. ``problems`` are those of its
    training.
    """

    version: Count
    digest: str
    path: str
    base: str
    fingerprint: str
    trained_on: list[str] = msgspec.field(default_factory=list)
    from_: str | None = msgspec.field(name="from", default=None)
    moved: Moved | None = None
    distilled: Distilled | None = None
    created: str
    lora: Lora
    parameters: Count
    dtype: str
    bytes: Count = 0
    data: DataSource | None = None
    eval_data: DataSource | None = None
    settings: dict[str, _Setting] | None = None
    run: Run | None = None
    problems: list[EntryProblem] = msgspec.field(default_factory=list)
    extracted: Extracted | None = None
    trained_tokens: list[str] = msgspec.field(default_factory=list)
    converted: Converted | None = None
    hub: HubSource | None = None
    pushed: HubSource | None = None
    versions: dict[str, str] = msgspec.field(default_factory=dict)


def _labelled(self: Adapter | Removed) -> dict[str, AdapterVersion]:
    """The versions by their labels: ``style@1``."""
    return {f"{self.name}@{version.version}": version for version in self.versions}


def _numbered(self: Adapter | Removed, number: int | None) -> AdapterVersion | None:
    """The version of that number; None where there is none."""
    return next((version for version in self.versions if version.version == number), None)


class Adapter(Entry, frozen=True, kw_only=True):
    """``adapters/NAME.yaml``: every version of one adapter, newest last."""

    name: str
    description: str = ""
    versions: list[AdapterVersion]
    labelled = _labelled
    numbered = _numbered

    def newest(self) -> AdapterVersion:
        return self.versions[-1]


class GivenNumber(Part, frozen=True, kw_only=True):
    """A version number that was given, and to what: it is never given to anything else."""

    version: Count
    digest: str


class Removed(Entry, frozen=True, kw_only=True):
    """``removed/NAME.yaml``: what an adapter had once. ``versions`` are those whose weights are still there."""

    name: str
    given: list[GivenNumber]
    versions: list[AdapterVersion] = msgspec.field(default_factory=list)
    labelled = _labelled
    numbered = _numbered


class Pinned(Part, frozen=True, kw_only=True):
    """One version of an adapter with a weight; printed as a term: ``style@1:0.7``."""

    adapter: str
    version: Count
    digest: str
    weight: Finite = 1.0

    @property
    def label(self) -> str:
        return f"{self.adapter}@{self.version}"

    def __str__(self) -> str:
        return format_term(self.label, self.weight)


class Member(Pinned, frozen=True, kw_only=True):
    """One member of a stack.

    ``layer_weights`` are weights by the name of a layer or a module, which stand there in place of ``weight``: see
    :mod:`stackctl.plan.layer_weights`.
    """

    layer_weights: dict[str, Finite] = msgspec.field(default_factory=dict)

    def json(self) -> dict[str, Any]:
        """A member as ``--json`` shows it: with its weight even where that is one."""
        told = {"adapter": self.adapter, "version": self.version, "digest": self.digest, "weight": self.weight}
        return {**told, "layer_weights": self.layer_weights} if self.layer_weights else told


class MethodOptions(Part, frozen=True, kw_only=True):
    """What a method of composing takes; which of it, :mod:`stackctl.plan.methods` says."""

    rank: Annotated[int, Meta(ge=1)] | Literal["auto"] | None = None
    tolerance: Annotated[float, Meta(gt=0, lt=1)] | None = None
    density: Annotated[float, Meta(gt=0, le=1)] | None = None
    seed: Annotated[int, Meta(ge=0)] | None = None


class Stack(Entry, frozen=True, kw_only=True):
    """``stacks/NAME.yaml``: a recipe, never a copy of tensors."""

    name: str
    base: str
    fingerprint: str
    method: str = "sum"
    options: MethodOptions = msgspec.field(default_factory=MethodOptions)
    members: list[Member]
    created: str

    @property
    def recipe(self) -> tuple[list[Member], str, MethodOptions]:
        """All that decides what it computes."""
        return self.members, self.method, self.options


class CheckpointMember(Pinned, frozen=True, kw_only=True):
    """One adapter that a checkpoint stands on; ``repo`` is where it lives on the Hub, when that was known."""

    repo: str | None = None


class AdapterInfo(msgspec.Struct, kw_only=True, frozen=True):
    """``adapter_info.json``: what a checkpoint that was copied elsewhere says of itself."""

    schema: int = 1
    adapter: str
    version: Count
    base: str
    base_fingerprint: str
    trained_on: list[CheckpointMember] = msgspec.field(default_factory=list)
    base_hub_id: str | None = None
    chat_template: str | None = None
    usage: str = ""
    created_by: str = ""
