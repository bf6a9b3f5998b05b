"""What this job will need of this machine's memory, said before the base is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from stackctl.engine.models import choose_device, choose_dtype, multiplies_in_bfloat16
from stackctl.engine.training.dataset import Corpus
from stackctl.jobs.job import PreparedJob
from stackctl.lora.target_modules import expand_modules, named_targets
from stackctl.machine.memory_estimate import MemoryEstimate, Precision, estimate_memory
from stackctl.machine.resources import main_memory


@dataclass(frozen=True)
class Estimate:
    """The memory of each process beside what there is; ``shared``: they all take it from the machine's RAM."""

    memory: MemoryEstimate
    available: int
    shared: bool

    def as_json(self) -> dict[str, Any]:
        return self.memory.as_json(self.available, shared=self.shared)

    def __str__(self) -> str:
        return self.memory.render(self.available, shared=self.shared)


def estimate_job(
    prepared: PreparedJob,
    corpus: Corpus,
    tokens: int = 0,
    *,
    processes: int = 1,
    sharded: bool = False,
    checkpointing: bool = False,
) -> Estimate:
    """The memory of a job on the largest micro-batch that its data can make.

    ``tokens`` is how many single tokens have their rows trained.
    """
    job, base = prepared.job, prepared.base
    device = choose_device()
    lengths = corpus.rows.lengths()
    largest = [int(row) for row in lengths.argsort()[::-1][: job.batch_size]]
    supervised = sum(example.supervised for row in largest for example in corpus.rows[row])
    targets = named_targets(prepared.target_modules, expand_modules(base.modules), base.output_embedding)
    memory = estimate_memory(
        base,
        rank=job.effective_rank(),
        targets=targets,
        tokens=int(lengths[largest].sum()),
        supervised=supervised,
        precision=_precision(prepared, device),
        live_rank=max(module.rank for module in prepared.plan.modules.values()) if prepared.stays_live else 0,
        processes=processes,
        sharded=sharded,
        checkpointing=checkpointing or job.gradient_checkpointing,
        heap=device.type == "cpu",
        token_rows=tokens,
    )
    if device.type == "cuda":
        return Estimate(memory, torch.cuda.mem_get_info(device)[0], shared=False)
    return Estimate(memory, main_memory().available, shared=True)


def _precision(prepared: PreparedJob, device: torch.device) -> Precision:
    job, base = prepared.job, prepared.base
    if job.dtype == "nf4":
        return "nf4"
    if choose_dtype(job.dtype, device, base) != torch.float32:
        return "half"
    hidden = next((shape.shape[1] for shape in base.modules.values() if shape.type == "Embedding"), 0)
    return "autocast" if job.dtype == "auto" and multiplies_in_bfloat16(device, hidden) else "float32"
