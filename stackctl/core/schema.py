"""The typed shape of every registry entry, recipe and training configuration; no I/O.

Keys that PEFT and the Hub use are used verbatim (``r``, ``lora_alpha``). Unknown keys are errors. The settings of
training stand here once: the command line, ``--config`` and ``stackctl.yaml`` are all made from them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

SCHEMA = 1
"""The version of every file that stackctl writes."""

_HUGE = 1e300
Finite = Annotated[float, Meta(ge=-_HUGE, le=_HUGE)]
"""A number that is neither NaN nor infinite."""
Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]
"""How many; no more than any machine could hold, so that it can be divided and shown."""
_Scalar = bool | Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | Finite | str
_Setting = _Scalar | list[str] | dict[str, _Scalar] | None


class Entry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What every registry file begins with."""

    schema: int = SCHEMA


class Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A piece of an entry: what is at its default is not written."""


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
    parameters only, see :mod:`stackctl.lora.target_parameters`.
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
    chat_template_kwargs: dict[str, _Scalar] | None = None
    tokenizer: str | None = None
    tied_embeddings: bool = False
    input_embedding: str | None = None
    output_embedding: str | None = None
    whole: WholeClass | None = None
    untrained_tokens: list[str] = msgspec.field(default_factory=list)
    proved: Proof | None = None
    former_names: dict[str, list[str]] = msgspec.field(default_factory=dict)
    converted_names: list[str] = msgspec.field(default_factory=list)
    modules: dict[str, ModuleShape]

    def __post_init__(self) -> None:
        if self.context_length is not None and self.context_length < 1:  # -1 of XLNet, as entries once had it
            msgspec.structs.force_setattr(self, "context_length", None)


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


class DataSource(Part, frozen=True, kw_only=True):
    """What an adapter was trained on: enough to recognise it, not the data itself."""

    path: str
    sha256: str
    records: Count
    format: str


class Run(Part, frozen=True, kw_only=True):
    """How training went. ``loss`` is the mean over the run's supervised tokens.

    ``initial_seed`` is what the new factors A were drawn with: on a frozen stack another than ``settings.seed``.
    On pairs ``loss`` is the mean over pairs, ``accuracy`` the share that was ranked rightly, ``margin`` the mean by how
    much; for KTO over answers. With held-out records: ``eval_loss`` is that of the registered weights, which are those
    of step ``kept_step``. ``batch_size`` and ``gradient_accumulation`` are how each process cut its steps, whatever the
    settings leave open; ``gradient_checkpointing``: activations were computed again.
    """

    steps: Count
    epochs: Finite
    loss: Finite
    tokens: Count
    supervised_tokens: Count
    seconds: Finite
    frozen: Literal["none", "fold", "live"]
    frozen_error: Finite | None = None
    initial_seed: Count | None = None
    dtype: str = "float32"
    device: str = "cpu"
    processes: Count = 1
    eval_loss_before: Finite | None = None
    eval_loss: Finite | None = None
    kept_step: Count | None = None
    stopped_early: bool = False
    template_date: str | None = None
    accuracy: Finite | None = None
    margin: Finite | None = None
    eval_accuracy: Finite | None = None
    eval_margin: Finite | None = None
    batch_size: Count | None = None
    gradient_accumulation: Count | None = None
    gradient_checkpointing: bool = False


class HubSource(Part, frozen=True, kw_only=True):
    """A place on the Hub: a repository at one commit, and the folder in it where one was asked for."""

    repo: str
    commit: str
    folder: str | None = None


class Extracted(Part, frozen=True, kw_only=True):
    """The full fine-tune that an adapter was made of, and what was lost: ‖ΔW - BA‖ / ‖ΔW‖ over all modules and of each.

    ``saved`` are modules kept whole, ``left_out`` parameters that changed and are not kept.
    """

    source: str
    revision: str | None = None
    fingerprint: str
    relative_error: Finite
    errors: dict[str, Finite] = msgspec.field(default_factory=dict)
    saved: list[str] = msgspec.field(default_factory=list)
    left_out: list[str] = msgspec.field(default_factory=list)


class EntryProblem(Part, frozen=True, kw_only=True):
    """What a person should know of a version for as long as it is there: a training that went wrong."""

    code: str
    message: str
    hint: str = ""


class Converted(Part, frozen=True, kw_only=True):
    """The adapter of another kind (``from``: ``LOHA``, ``DORA``, ``PISSA``, …) that a plain LoRA was made of.

    ``relative_error`` is ‖ΔW - BA‖ / ‖ΔW‖ over all modules, ``errors`` that of each; ``output_error`` how far logits
    are from those of the original, as a share of what it changes in them. ``digest`` is the original's.
    """

    from_: str = msgspec.field(name="from")
    digest: str
    relative_error: Finite
    output_error: Finite
    errors: dict[str, Finite] = msgspec.field(default_factory=dict)


class Moved(Part, frozen=True, kw_only=True):
    """How an adapter that began at the factors of another was found on another stack, or base, than it stood on.

    ``base`` and ``trained_on`` are those that it stood on. On ``records``, whose ``tokens`` are supervised,
    ``loss_before`` is that of the adapter there, ``loss_copy`` of its plain copy here, ``difference_error`` the
    standard error of their difference; ``divergence`` the mean KL divergence (nats a token) of the outputs before from
    those of the copy. ``loss_corrected`` is that of the closed-form correction, at which it began if ``corrected``.
    ``own_data``: the records are of a file that the adapter was trained or judged on. ``mark`` is its loss there on
    the held-out records, and ``reached_step`` the first step with a loss that is no higher.
    """

    base: str
    trained_on: list[str]
    records: Count
    tokens: Count
    own_data: bool
    divergence: Finite
    divergence_error: Finite | None
    loss_before: Finite
    loss_copy: Finite
    difference_error: Finite | None
    loss_corrected: Finite | None
    corrected: bool
    mark: Finite | None
    reached_step: Count | None
    seconds: Finite


class AdapterVersion(Part, frozen=True, kw_only=True):
    """One immutable version of an adapter. ``trained_on`` are terms of an expression, pinned: ``style@1:0.7``.

    ``from`` is the version at whose factors its training began, ``moved`` what was found where that stood elsewhere;
    ``trained_tokens`` are those whose rows it has trained;
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


class Adapter(Entry, frozen=True, kw_only=True):
    """``adapters/NAME.yaml``: every version of one adapter, newest last."""

    name: str
    description: str = ""
    versions: list[AdapterVersion]

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


class Member(Part, frozen=True, kw_only=True):
    """One member of a stack, pinned.

    ``layer_weights`` are weights by the name of a layer or a module, which stand there in place of ``weight``: see
    :mod:`stackctl.plan.layer_weights`.
    """

    adapter: str
    version: Count
    digest: str
    weight: Finite = 1.0
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


Rank = Annotated[int, Meta(ge=1, le=65536, description="Rank of the adapter's two factors.")]


_RANK = 16
_BATCH_SIZE = 8


class TrainSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that decides what training makes of given data, with its one default."""

    rank: Rank = _RANK
    alpha: Annotated[float, Meta(gt=0, le=_HUGE, description="LoRA alpha; twice the rank if left out.")] | None = None
    dropout: Annotated[float, Meta(ge=0, lt=1, description="Dropout before the new adapter.")] = 0.0
    target_modules: Annotated[
        list[str] | str, Meta(description="Modules to adapt: names joined by ',', a regular expression, or all-linear.")
    ] = "all-linear"
    use_rslora: Annotated[bool, Meta(description="Scale by alpha/sqrt(rank) instead of alpha/rank.")] = False
    orthogonal: Annotated[
        bool, Meta(description="Keep what the new adapter reads orthogonal to what the frozen stack reads.")
    ] = False
    train_tokens: Annotated[
        list[str] | str,
        Meta(description="Single tokens to train the rows of, joined by ','; auto: those the base never learned."),
    ] = "none"
    objective: Annotated[
        Literal["sft", "dpo", "ipo", "kto", "orpo", "simpo"],
        Meta(
            description="What is made small: sft on any records; kto on answers with a label; the others on pairs of a "
            "chosen and a rejected answer."
        ),
    ] = "sft"
    beta: (
        Annotated[float, Meta(gt=0, le=_HUGE, description="Strength of the preference; 0.1 if left out, for simpo 2.")]
        | None
    ) = None
    label_smoothing: Annotated[
        float, Meta(ge=0, lt=0.5, description="Share of pairs that dpo takes to be the wrong way round.")
    ] = 0.0
    sft_weight: Annotated[
        float,
        Meta(
            ge=0, le=_HUGE, description="Weight of the chosen answer's own loss per token, besides dpo, ipo or simpo."
        ),
    ] = 0.0
    epochs: Annotated[float, Meta(gt=0, le=_HUGE, description="Passes over the data.")] = 3
    max_steps: Annotated[int, Meta(ge=1, description="Stop after this many optimizer steps.")] | None = None
    batch_size: Annotated[int, Meta(ge=1, description="Records in a micro-batch, per process.")] = _BATCH_SIZE
    gradient_accumulation: Annotated[int, Meta(ge=1, description="Micro-batches in an optimizer step.")] = 1
    max_length: Annotated[int, Meta(ge=2, description="Longest record in tokens; what is longer is cut.")] = 1024
    pack: Annotated[
        bool, Meta(description="Join text records into full sequences of --max-length, documents kept apart.")
    ] = False
    chat_template_kwargs: Annotated[
        str | dict[str, _Scalar] | None,
        Meta(description="Arguments for the chat template, as a JSON object; those of a record come first."),
    ] = None
    enable_thinking: Annotated[
        bool | None, Meta(description="The chat template's argument of that name: whether the assistant thinks first.")
    ] = None
    learning_rate: Annotated[float, Meta(gt=0, le=_HUGE, description="Peak learning rate.")] = 2e-4
    scheduler: Annotated[
        Literal["linear", "cosine", "constant", "constant_with_warmup"],
        Meta(description="How the learning rate goes."),
    ] = "cosine"
    warmup: Annotated[
        float, Meta(ge=0, le=_HUGE, description="Warm-up: a share of all steps when below 1, else a number of steps.")
    ] = 0.03
    optimizer: Annotated[
        Literal["adamw", "adamw-8bit", "paged-adamw-8bit"],
        Meta(
            description="AdamW with its state in float32; in 8 bits; or in 8 bits and in main memory where a GPU's is "
            "full. The last two need the extra [quant]."
        ),
    ] = "adamw"
    weight_decay: Annotated[float, Meta(ge=0, le=_HUGE, description="Weight decay of AdamW.")] = 0.0
    seed: Annotated[int, Meta(ge=0, le=2**32 - 1, description="Seed of initialisation, order and dropout.")] = 0
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16", "nf4"],
        Meta(
            description="Precision of the base; the adapter is always float32. auto on a CPU: float32 weights, "
            "multiplied in bfloat16 where that is faster; nf4 needs the extra [quant]."
        ),
    ] = "auto"
    frozen: Annotated[
        Literal["auto", "fold", "live"],
        Meta(description="The frozen stack: folded into the base in memory, or kept live beside it."),
    ] = "auto"
    eval_steps: (
        Annotated[
            int,
            Meta(
                ge=1, description="Optimizer steps between evaluations on --eval-data; a tenth of the run if left out."
            ),
        ]
        | None
    ) = None
    keep: Annotated[
        Literal["best", "last"],
        Meta(description="With --eval-data: which weights are registered, those with the lowest loss or the last."),
    ] = "best"
    patience: (
        Annotated[
            int, Meta(ge=1, description="Stop after so many evaluations on --eval-data in a row without a lower loss.")
        ]
        | None
    ) = None

    @property
    def effective_beta(self) -> float | None:
        """``beta`` as it is used; none where nothing is preferred."""
        if self.objective == "sft":
            return None
        return self.beta if self.beta is not None else {"simpo": 2.0}.get(self.objective, 0.1)

    def effective_alpha(self) -> float:
        return self.alpha if self.alpha is not None else 2.0 * self.effective_rank()

    def effective_rank(self) -> int:
        return self.rank or _RANK


_RankOrOwn = (
    Annotated[int, Meta(ge=1, le=65536, description="Rank of the adapter's two factors; 16 if left out.")] | None
)


_BatchSizeOrAuto = Annotated[
    Annotated[int, Meta(ge=1)] | Literal["auto"],
    Meta(
        description="Records in a micro-batch, per process; auto: as many as fit into memory, with a step of as many "
        "records as ever."
    ),
]


class TrainJob(TrainSettings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One adapter to train, as a recipe or ``--config`` says it."""

    rank: _RankOrOwn = None  # type: ignore[assignment]  # None: that of what it begins at, else the default
    batch_size: _BatchSizeOrAuto = _BATCH_SIZE  # type: ignore[assignment]  # auto: how a step is cut is left open
    on: Annotated[
        str | None,
        Meta(
            description="The stack that it stands on, frozen and active: style, style:0.7+tone, "
            "or nothing for the bare base."
        ),
    ] = None
    from_: Annotated[
        str | None,
        Meta(
            description="Begin at another adapter's factors, with its rank, alpha and modules; "
            "a higher --rank adds to them."
        ),
    ] = msgspec.field(name="from", default=None)
    rebase: Annotated[
        bool,
        Meta(description="Begin at its own newest version where what lies beneath it is another since."),
    ] = False
    base: Annotated[
        str | None, Meta(description="The base, when there are several and it stands on none of your stacks.")
    ] = None
    data: Annotated[
        str | None,
        Meta(
            description="What to learn from: .jsonl, .json, .parquet, .csv, .txt, a folder of texts, or a Hub data set."
        ),
    ] = None
    eval_data: Annotated[
        str | None,
        Meta(description="Held-out records: evaluated every --eval-steps steps, and the best weights are registered."),
    ] = None
    description: Annotated[str, Meta(description="A line about the adapter.")] = ""
    save_steps: (
        Annotated[int, Meta(ge=1, description="Save the run every so many optimizer steps, for --resume.")] | None
    ) = None
    report_to: Annotated[
        list[str] | str | None,
        Meta(description="Where to report to besides, several joined by ',': tensorboard, trackio, wandb."),
    ] = None
    num_processes: (
        Annotated[
            int,
            Meta(
                ge=1, le=65536, description="Train in that many processes, one to a GPU, by way of accelerate launch."
            ),
        ]
        | None
    ) = None
    accelerate_config: Annotated[
        str | None, Meta(description="A configuration of accelerate's: DDP, FSDP, DeepSpeed.")
    ] = None
    cache: Annotated[
        bool, Meta(description="Keep the tokens of the data on disk, for runs to come and for data larger than memory.")
    ] = True
    gradient_checkpointing: (
        Annotated[
            bool,
            Meta(
                description="Compute activations twice instead of keeping them: less memory, about a third slower. "
                "Left out: where memory is enough only so."
            ),
        ]
        | None
    ) = None

    @property
    def held_out_decides(self) -> bool:
        """Whether the held-out records have a say in which weights come out."""
        return self.eval_data is not None and (self.keep == "best" or self.patience is not None)

    def effective_batch_size(self) -> int:
        """Records in a micro-batch as they are asked for; ``auto`` may cut them into smaller ones."""
        return _BATCH_SIZE if self.batch_size == "auto" else self.batch_size

    def settings(self) -> TrainSettings:
        told = {name: getattr(self, name) for name in TrainSettings.__struct_fields__}
        effective = {"rank": self.effective_rank(), "batch_size": self.effective_batch_size()}
        return TrainSettings(**{**told, **effective})


class PushTarget(Part, frozen=True, kw_only=True):
    stack: str | None = None
    repo: str
    base_id: str | None = None
    private: bool = False


class Recipe(Part, frozen=True, kw_only=True):
    """``stackctl.yaml``: what to train, on what, and what to make of it."""

    base: str | None = None
    train: dict[str, TrainJob] = msgspec.field(default_factory=dict)
    stacks: dict[str, str] = msgspec.field(default_factory=dict)
    push: PushTarget | None = None


class CheckpointMember(Part, frozen=True, kw_only=True):
    """One adapter that a checkpoint stands on; ``repo`` is where it lives on the Hub, when that was known."""

    adapter: str
    version: Count
    digest: str
    weight: Finite = 1.0
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
