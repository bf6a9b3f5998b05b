"""How a job is launched: by ``--num-processes``, or by a configuration of accelerate's; checked before it begins."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec

from stackctl.core.errors import Usage, raise_all
from stackctl.jobs import ranks
from stackctl.jobs.job import PreparedJob
from stackctl.jobs.micro_batches import StepCut
from stackctl.storage.paths import existing_path, typed_path
from stackctl.storage.yaml_files import convert, read_document


@dataclass(frozen=True)
class Launch:
    """How to launch: the number of processes, accelerate's configuration, whether it shards the model and
    whether it computes activations again; and how each process is to cut its steps.

    ``again`` is the command that goes on after an interruption.
    """

    processes: int
    config: Path | None
    sharded: bool = False
    checkpointing: bool = False
    cuts: tuple[StepCut, ...] = ()
    resume: bool = False
    again: str = ""


def plan_launch(prepared: PreparedJob) -> Launch | None:
    """How this job is to be launched; None when it is trained in this process.

    Under a launcher already it is trained here, as one of the run's processes.

    Raises:
        NotFound, Usage: the configuration is missing, is none of accelerate's, or contradicts the job.
    """
    job = prepared.job
    if ranks.is_worker() or (job.num_processes in (None, 1) and not job.accelerate_config):
        return None
    if ranks.is_launched():
        if job.num_processes and job.num_processes != ranks.world_size():
            raise Usage(
                f"--num-processes {job.num_processes}, but the launcher started {ranks.world_size()}",
                hint="leave out --num-processes where something else launches the processes",
            )
        return None
    if not job.accelerate_config:
        return Launch(job.num_processes or 1, None)
    path = existing_path(typed_path(job.accelerate_config, what="--accelerate-config"), "the configuration")
    document = read_document(path)
    if not isinstance(document.value, dict) or "distributed_type" not in document.value:
        raise Usage(
            f"{path} is not a configuration of accelerate",
            hint=f"accelerate config --config_file {shlex.quote(str(path))}",
        )
    config = convert(document, _Config)
    _check_config(path, config)
    if config.distributed_type in ("FSDP", "DEEPSPEED"):
        check_whole_parameters(prepared)
    processes = job.num_processes or config.num_processes or 1
    sharded = config.distributed_type == "FSDP"
    checkpointing = sharded and config.fsdp_config is not None and config.fsdp_config.fsdp_activation_checkpointing
    return Launch(processes, path.resolve(), sharded, bool(checkpointing)) if processes > 1 else None


def check_whole_parameters(prepared: PreparedJob) -> None:
    """What a job asks for that needs whole parameters: FSDP and DeepSpeed keep parts of them in each process.

    Raises:
        Usage: it asks for some of that; all of it at once.
    """
    job, distils = prepared.job, prepared.teacher is not None
    needs = [
        (job.orthogonal, "--orthogonal", "projects whole factors"),
        (prepared.trains_tokens, "--train-tokens", "trains rows of a whole embedding"),
        (job.eight_bits, "--optimizer", "of 8 bits needs whole factors"),
        (distils, "--objective distil", "runs a teacher beside the new adapter, both of them whole"),
    ]
    raise_all(
        Usage(
            f"{option} {what}, and FSDP and DeepSpeed keep parts in each process",
            hint=f"use distributed_type: MULTI_GPU, or leave out {option}",
        )
        for asked, option, what in needs
        if asked
    )


class _Fsdp(msgspec.Struct):
    fsdp_version: int | None = None
    fsdp_activation_checkpointing: bool | None = None


class _DeepSpeed(msgspec.Struct):
    zero_stage: int | None = None


class _Config(msgspec.Struct):
    """What of a configuration of accelerate's is looked at here; there is much more in it."""

    distributed_type: str
    num_processes: Annotated[int, msgspec.Meta(ge=1, le=65536)] | None = None
    num_machines: int | None = None
    fsdp_config: _Fsdp | None = None
    deepspeed_config: _DeepSpeed | None = None


def _check_config(path: Path, config: _Config) -> None:
    if (config.num_machines or 1) > 1:
        raise Usage(
            f"{path} is for several machines, and this command launches on one",
            hint=f"on each machine: accelerate launch --config_file {shlex.quote(str(path))} -m stackctl train …",
        )
    fsdp, deepspeed = config.fsdp_config or _Fsdp(), config.deepspeed_config or _DeepSpeed()
    if config.distributed_type == "FSDP" and (fsdp.fsdp_version or 1) != 2:
        raise Usage(f"{path}: FSDP of version 1 cannot shard a frozen base", hint="set fsdp_version: 2 in fsdp_config")
    if config.distributed_type == "DEEPSPEED" and (deepspeed.zero_stage or 0) > 2:
        raise Usage(f"{path}: a base sharded by ZeRO 3 cannot be proved", hint="use zero_stage: 2, or FSDP")
