"""transformers' Trainer, told what a stack needs: exact loss, the right adapter saved, numbers of the whole run.

Trainer keeps what it is good at: the loop, accumulation, optimizer, schedule, distribution, resuming. Overridden is
only what would otherwise be silently wrong here.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from stackctl.core.errors import Failed, first_line
from stackctl.engine.logits import supervised_loss
from stackctl.engine.training.adapter import adapter_state, named_parameters, save_adapter
from stackctl.engine.training.callbacks import Counters, Progress, StepGuard
from stackctl.engine.training.distributed import WholeSteps, like, wait
from stackctl.lora.checkpoint import WEIGHTS
from stackctl.registry.run_folders import RunFolder
from stackctl.storage import files

if TYPE_CHECKING:
    from stackctl.engine.training.early_stopping import HeldOut

_COUNTERS = "stackctl_counters.json"


class StackTrainer(Trainer):
    """Trainer for one adapter on a frozen stack; see the module's docstring."""

    def __init__(
        self,
        *args: Any,
        run: RunFolder,
        counters: Counters,
        as_rows: bool,
        bfloat16: bool,
        progress: Progress,
        say: Callable[[str], None],
        held_out: HeldOut | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._run = run
        self.order: WholeSteps | None = None
        self.held_out = held_out
        self._bfloat16 = bfloat16
        self.counters = counters
        self._as_rows = as_rows
        self._step_loss = torch.zeros((), dtype=torch.float64, device=self._sum_device())
        self._step_tokens = self._step_supervised = 0
        self.model_accepts_loss_kwargs = True  # the loss below is normalised over the whole step already
        for printer in (PrinterCallback, ProgressCallback):  # they print on stdout, which belongs to the result
            self.remove_callback(printer)
        self.guard = StepGuard(self, progress, say)
        self.add_callback(self.guard)
        if held_out:
            self.add_callback(held_out)

    def _sum_device(self) -> torch.device:
        device = self.args.device
        return torch.device("cpu") if device.type == "mps" else device  # MPS has no float64

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor:
        """Supervised tokens of the whole optimizer step, over all micro-batches and ranks."""
        count = torch.tensor(sum(batch["labels"].numel() for batch in batch_samples), device=device)
        return self.accelerator.gather(count).sum() if self.args.world_size > 1 else count

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        """Cross-entropy summed over this micro-batch, divided by the supervised tokens of the whole step."""
        # Not Trainer's own bf16 flag: that leaves the model's forward wrapped, and the proofs look at it afterwards.
        with torch.autocast(self.args.device.type, torch.bfloat16, enabled=self._bfloat16):
            total = supervised_loss(model, inputs, as_rows=self._as_rows)
        self._step_loss += total.detach().to(self._step_loss)
        if inputs["labels"].numel():  # else a place that only keeps the ranks in step
            self._step_tokens += inputs["input_ids"].numel()
            self._step_supervised += inputs["labels"].numel()
        # DDP averages gradients over ranks, and this is each rank's share of one mean: undo the average.
        return total / num_items_in_batch * self.args.world_size

    def take_step_totals(self, stop: int) -> tuple[float, int, int, int]:
        """Loss sum, tokens and supervised tokens since the last call, over all ranks; and the signal that any got."""
        own = [float(self._step_loss), float(self._step_tokens), float(self._step_supervised)]
        self._step_loss.zero_()
        self._step_tokens = self._step_supervised = 0
        each = self._from_processes([*own, float(stop)])
        loss, tokens, supervised, _ = each.sum(0).tolist()
        return loss, int(tokens), int(supervised), int(each[:, 3].max())

    def sum_over_processes(self, numbers: list[float]) -> list[float]:
        """Numbers of each process, added up; every process gets the sums."""
        sums: list[float] = self._from_processes(numbers).sum(0).tolist()
        return sums

    def _from_processes(self, numbers: list[float]) -> Tensor:
        """Numbers of each process as rows, (processes, N), in float64."""
        own = torch.tensor([numbers], dtype=torch.float64, device=self._sum_device())
        return self.accelerator.gather(own) if self.args.world_size > 1 else own

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Look at the held-out records. Trainer's own loop would pad them and average over batches."""
        assert self.held_out is not None, "nothing asks for this without held-out records"
        started = time.perf_counter()
        metrics = {"eval_loss": self.held_out.look(self)}
        self.log(metrics)
        # Callbacks change the one control that Trainer holds.
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.guard.away += time.perf_counter() - started
        return metrics

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """The order of one process, dealt out so that no record is seen twice."""
        if self.args.world_size == 1:
            return super()._get_train_sampler(train_dataset)
        places = self.args.per_device_train_batch_size * self.args.world_size
        self.order = WholeSteps(len(self.train_dataset) - 1, places, self.args.data_seed)
        return self.order

    # -- saves of an unfinished run -------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the adapter in training and nothing else, at the folder's root, whatever wraps the model."""
        model = self.accelerator.unwrap_model(self.model)
        state = adapter_state(model)
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            save_adapter(model, folder, state)
            files.write_atomic(folder / _COUNTERS, json.dumps(asdict(self.counters)))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """A save is one only when all ranks have written all of it to the disk."""
        save = self._run.save_at(self.state.global_step)
        try:
            super()._save_checkpoint(model, trial)
            wait()
            if self.args.should_save:
                self._run.finish(save)
        except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors wrap what the system said
            files.remove_tree(save)
            raise Failed(
                f"{save.name} could not be written: {first_line(error)}",
                hint="free some space; the same command with --resume goes on from the save before it",
            ) from error

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """What every process has a part of: here also the best weights so far."""
        super()._save_optimizer_and_scheduler(output_dir)
        if self.held_out:
            self.held_out.save(Path(output_dir), self.args.process_index)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load the adapter in training by its name. Trainer's own way takes the first adapter, and unfreezes it."""
        self.restore(Path(resume_from_checkpoint), model)

    def restore(self, folder: Path, model: nn.Module | None = None) -> None:
        """The adapter in training, the numbers of the run and the best weights so far, out of a save."""
        parameters = named_parameters(self.accelerator.unwrap_model(model or self.model))
        saved = load_file(folder / WEIGHTS)
        if saved.keys() != parameters.keys():
            raise Failed(f"{folder} is not a save of this run", hint="start it again without --resume")
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(like(parameter, saved[name]))
        for name, value in json.loads((folder / _COUNTERS).read_text()).items():
            setattr(self.counters, name, value)
        if self.held_out:
            self.held_out.load(folder, self.args.process_index)
