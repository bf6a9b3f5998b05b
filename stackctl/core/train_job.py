"""What training takes: the settings of a job, a job, and the recipe of a project; no I/O.

The settings of training stand here once: the command line, ``--config`` and ``stackctl.yaml`` are all made from them.
Unknown keys are errors.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from stackctl.core.fields import HUGE, Part, Scalar

_RANK = 16
_BATCH_SIZE = 8
_Rank = Annotated[int, Meta(ge=1, le=65536)]
_Positive = Annotated[float, Meta(gt=0, le=HUGE)]
_NotNegative = Annotated[float, Meta(ge=0, le=HUGE)]
_MOST = 2**31 - 1
"""The largest count. Entries hold no number of more than 64 bits, nor can the libraries count further."""
_AtLeastOne = Annotated[int, Meta(ge=1, le=_MOST)]


def _about(text: str) -> Meta:
    """What a setting is, for the help and the errors."""
    return Meta(description=text)


class TrainSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that decides what training makes of given data, with its one default."""

    rank: Annotated[_Rank, _about("Rank of the adapter's two factors.")] = _RANK
    alpha: Annotated[_Positive | None, _about("LoRA alpha; twice the rank if left out.")] = None
    dropout: Annotated[float, Meta(ge=0, lt=1, description="Dropout before the new adapter.")] = 0.0
    target_modules: Annotated[
        list[str] | str, _about("Modules to adapt: names joined by ',', a regular expression, or all-linear.")
    ] = "all-linear"
    use_rslora: Annotated[bool, _about("Scale by alpha/sqrt(rank) instead of alpha/rank.")] = False
    orthogonal: Annotated[
        bool, _about("Keep the input directions of the new adapter orthogonal to those of the frozen stack.")
    ] = False
    train_tokens: Annotated[
        list[str] | str,
        _about(
            "Tokens whose rows of the embedding are trained, joined by ','; auto: those that the base never learned."
        ),
    ] = "none"
    objective: Annotated[
        Literal["sft", "dpo", "ipo", "kto", "orpo", "simpo", "distil"],
        _about(
            "The loss: sft on any records; kto on answers with a label; distil, the divergence from --teacher; "
            "the others on pairs of a chosen and a rejected answer."
        ),
    ] = "sft"
    beta: Annotated[_Positive | None, _about("Strength of the preference; 0.1 if left out, for simpo 2.")] = None
    label_smoothing: Annotated[
        float, Meta(ge=0, lt=0.5, description="Share of pairs that dpo takes to be mislabelled.")
    ] = 0.0
    sft_weight: Annotated[
        _NotNegative, _about("Weight of the chosen answer's own loss per token, besides dpo, ipo or simpo.")
    ] = 0.0
    epochs: Annotated[_Positive, _about("Passes over the data.")] = 3
    max_steps: Annotated[_AtLeastOne | None, _about("Stop after this many optimizer steps.")] = None
    batch_size: Annotated[_AtLeastOne, _about("Records in a micro-batch, per process.")] = _BATCH_SIZE
    gradient_accumulation: Annotated[_AtLeastOne, _about("Micro-batches in an optimizer step.")] = 1
    max_length: Annotated[int, Meta(ge=2, le=_MOST, description="Longest record in tokens; what is longer is cut.")] = (
        1024
    )
    pack: Annotated[bool, _about("Join text records into full sequences of --max-length, documents kept apart.")] = (
        False
    )
    chat_template_kwargs: Annotated[
        str | dict[str, Scalar] | None,
        _about("Arguments for the chat template, as a JSON object; those of a record come first."),
    ] = None
    enable_thinking: Annotated[
        bool | None, _about("The chat template's argument of that name: whether the assistant thinks first.")
    ] = None
    learning_rate: Annotated[_Positive, _about("Peak learning rate.")] = 2e-4
    scheduler: Annotated[
        Literal["linear", "cosine", "constant", "constant_with_warmup"], _about("Schedule of the learning rate.")
    ] = "cosine"
    warmup: Annotated[
        _NotNegative,
        _about("Warm-up: a share of all steps when below 1, rounded down, else a number of steps; not all."),
    ] = 0.03
    optimizer: Annotated[
        Literal["adamw", "adamw-8bit", "paged-adamw-8bit"],
        _about(
            "AdamW with its state in float32; in 8 bits; or in 8 bits, paged to main memory where a GPU's is full. "
            "The last two need the extra [quant]."
        ),
    ] = "adamw"
    weight_decay: Annotated[_NotNegative, _about("Weight decay of AdamW.")] = 0.0
    seed: Annotated[int, Meta(ge=0, le=2**32 - 1, description="Seed of initialisation, order and dropout.")] = 0
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16", "nf4"],
        _about(
            "Precision of the base; the adapter is always float32. auto on a CPU: float32 weights, multiplied in "
            "bfloat16 where that is faster; nf4 needs the extra [quant]."
        ),
    ] = "auto"
    frozen: Annotated[
        Literal["auto", "fold", "live"],
        _about("The frozen stack: folded into the base in memory, or kept live beside it."),
    ] = "auto"
    eval_steps: Annotated[
        _AtLeastOne | None,
        _about("Optimizer steps between evaluations on --eval-data; a tenth of the run if left out."),
    ] = None
    keep: Annotated[
        Literal["best", "last"],
        _about("With --eval-data: which weights are registered, those with the lowest loss or the last."),
    ] = "best"
    patience: Annotated[
        _AtLeastOne | None, _about("Stop after so many evaluations on --eval-data in a row without a lower loss.")
    ] = None

    @property
    def prefers(self) -> bool:
        """Whether it learns from answers of which some are preferred."""
        return self.objective not in ("sft", "distil")

    @property
    def eight_bits(self) -> bool:
        """Whether the optimizer's state is kept in 8 bits, which bitsandbytes does."""
        return self.optimizer != "adamw"

    @property
    def effective_beta(self) -> float | None:
        """``beta`` as it is used; none where nothing is preferred."""
        if not self.prefers:
            return None
        return self.beta if self.beta is not None else {"simpo": 2.0}.get(self.objective, 0.1)

    def effective_alpha(self) -> float:
        return self.alpha if self.alpha is not None else 2.0 * self.effective_rank()

    def effective_rank(self) -> int:
        return self.rank or _RANK


class TrainJob(TrainSettings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One adapter to train, as a recipe or ``--config`` says it.

    ``rank`` None is that of what it begins at, else the default; ``batch_size`` auto leaves open how a step is cut.
    """

    rank: Annotated[_Rank | None, _about("Rank of the adapter's two factors; 16 if left out.")] = None  # type: ignore[assignment]
    batch_size: Annotated[
        _AtLeastOne | Literal["auto"],
        _about(
            "Records in a micro-batch, per process; auto: as many as fit into memory, in steps of as many records as "
            "without it."
        ),
    ] = _BATCH_SIZE  # type: ignore[assignment]
    on: Annotated[
        str | None,
        _about("The stack that it stands on, frozen and active: style, style:0.7+tone, or nothing for the bare base."),
    ] = None
    from_: Annotated[
        str | None,
        _about("Begin at another adapter's factors, with its rank, alpha and modules; a higher --rank adds to them."),
    ] = msgspec.field(name="from", default=None)
    rebase: Annotated[bool, _about("Begin at its own newest version if the stack beneath it has changed since.")] = (
        False
    )
    teacher: Annotated[
        str | None, _about("With --objective distil: the stack whose probabilities are learned, or base with --system.")
    ] = None
    system: Annotated[
        str | None, _about("With --objective distil: a text file that the teacher alone reads, as its system prompt.")
    ] = None
    base: Annotated[str | None, _about("The base, when there are several and it stands on none of your stacks.")] = None
    data: Annotated[
        str | None,
        _about("What to learn from: .jsonl, .json, .parquet, .csv, .txt, a folder of texts, or a Hub data set."),
    ] = None
    eval_data: Annotated[
        str | None, _about("Held-out records: evaluated every --eval-steps steps, and the best weights are registered.")
    ] = None
    description: Annotated[str, _about("A line about the adapter.")] = ""
    save_steps: Annotated[_AtLeastOne | None, _about("Save the run every so many optimizer steps, for --resume.")] = (
        None
    )
    report_to: Annotated[
        list[str] | str | None, _about("Trackers to report to, joined by ',': tensorboard, trackio, wandb.")
    ] = None
    num_processes: Annotated[
        Annotated[int, Meta(ge=1, le=65536)] | None,
        _about("Train in that many processes, one to a GPU, by way of accelerate launch."),
    ] = None
    accelerate_config: Annotated[str | None, _about("A configuration file of accelerate: DDP, FSDP, DeepSpeed.")] = None
    cache: Annotated[
        bool, _about("Cache the tokens of the data on disk, for later runs and for data larger than memory.")
    ] = True
    gradient_checkpointing: Annotated[
        bool | None,
        _about(
            "Compute activations twice instead of keeping them: less memory, about a third slower. Left out: only "
            "where memory is too small without."
        ),
    ] = None

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
