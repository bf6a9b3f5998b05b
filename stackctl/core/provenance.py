"""How a version of an adapter came to be, as its entry tells it: its data, its training, or what it was made out of."""

from __future__ import annotations

from typing import Literal

import msgspec

from stackctl.core.fields import Count, Finite, Part


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


class Distilled(Part, frozen=True, kw_only=True):
    """Whose probabilities an adapter has learned: an expression, pinned, and the digest of a system prompt.

    On held-out records, where there were some: the KL divergence of the teacher from the adapter (nats a token) at its
    beginning, the best pair of its rank for the teacher's sum, and as it is registered, each with its standard error;
    and its own cross-entropy (nats a token) at both.
    """

    teacher: str
    system: str | None = None
    divergence_before: Finite | None = None
    divergence_before_error: Finite | None = None
    divergence: Finite | None = None
    divergence_error: Finite | None = None
    loss_before: Finite | None = None
    loss: Finite | None = None
