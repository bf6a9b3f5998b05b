"""Whether a micro-batch fits into a device's memory, by computing the largest that the data can make.

An estimate comes near; an allocator that runs out says so, and then the next smaller cut of a step is tried.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence

import torch
from peft import PeftModel

from stackctl.core import Say
from stackctl.core.errors import Failed
from stackctl.engine.training.dataset import Corpus
from stackctl.engine.training.distributed import is_sharded, told_by_each
from stackctl.engine.training.memory import largest_rows
from stackctl.engine.training.preferences import AnswerRows, collate_answers
from stackctl.engine.training.trainer import CHECKPOINTING, TrainerParts, micro_batch_loss
from stackctl.jobs.micro_batches import StepCut

_STATE = 2
"""Values that the optimizer keeps for each that is trained, which it makes in its first step."""


def runs_out_safely(device: torch.device) -> bool:
    """Whether more than there is can be asked for, with an error as the answer: main memory would end the process.

    Under FSDP each process still holds the whole base here, which says nothing of the run.
    """
    return device.type == "cuda" and not is_sharded()


def memory_full() -> Failed:
    return Failed(
        "the device's memory is full", hint="use --batch-size auto, --gradient-checkpointing, or a smaller --max-length"
    )


def first_that_runs(
    model: PeftModel, corpus: Corpus, parts: TrainerParts, cuts: Sequence[StepCut], say: Say
) -> StepCut:
    """The first of ``cuts`` whose largest micro-batch goes forward and back in this memory, in all processes.

    Raises:
        Failed: not even that of the last one does.
    """
    own = next((number for number, cut in enumerate(cuts) if _runs(model, corpus, parts, cut)), len(cuts))
    number = max(told_by_each(own))
    if number == len(cuts):
        raise memory_full()
    if number:
        say(f"note: {cuts[0]} did not fit when it was tried: it is {cuts[number]}")
    return cuts[number]


def _runs(model: PeftModel, corpus: Corpus, parts: TrainerParts, cut: StepCut) -> bool:
    device = next(model.parameters()).device
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rows = AnswerRows(corpus.rows, parts.answers) if parts.answers else corpus.rows
    batch = collate_answers([rows[row] for row in largest_rows(corpus, cut.records)], drifts=parts.drifts)
    swapped = batch.pop("swapped", None)  # it is read without a gradient, which takes less
    was_training = model.training
    try:
        state = [torch.empty_like(parameter) for parameter in trained for _ in range(_STATE)]
        inputs = {key: value.to(device) for key, value in batch.items()}
        drift = torch.zeros((), device=device) if swapped is not None else None
        model.train()
        if cut.checkpointing:
            model.gradient_checkpointing_enable(CHECKPOINTING)
        cuda = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(cuda), torch.autocast(device.type, torch.bfloat16, enabled=parts.bfloat16):
            micro_batch_loss(model, inputs, parts, drift)[0].backward()  # type: ignore[no-untyped-call]
        del state
    except torch.OutOfMemoryError:
        return False
    finally:
        if cut.checkpointing:
            model.gradient_checkpointing_disable()
        model.train(was_training)
        for parameter in trained:
            parameter.grad = None
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return True
