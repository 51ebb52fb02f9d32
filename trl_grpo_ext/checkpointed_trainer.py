"""TRL's trainer, with checkpoints from which a run goes on as if it had not ended."""

from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import broadcast_object_list, send_to_device
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from ._upstream import GRPOTrainer
from .checkpoints import (
    REFERENCE_NAME,
    find_checkpoint,
    load_reference,
    open_checkpoint,
    save_reference,
    seal_checkpoint,
)
from .config import GRPOExtConfig
from .swapped import swapped


class CheckpointedTrainer(GRPOTrainer):
    """
    [`~trl.GRPOTrainer`] whose checkpoints say whether they are complete and also hold a reference that has moved.

    A checkpoint amid the updates on one generated batch holds that batch too. So a run that is resumed goes on with
    the same reference, completions and random numbers, on the same number of processes.
    """

    args: GRPOExtConfig

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._resumed_from: Path | None = None
        self.add_callback(_Restore(self))

    def _reference_parameters(self) -> dict[str, torch.Tensor]:
        """By name, the parameters of the reference that a checkpoint has to hold."""
        raise NotImplementedError

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """
        TRL's, which resumes from nothing but a complete checkpoint.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                A checkpoint's folder, or `True` for the newest complete one in `output_dir`.

        Raises:
            ValueError: the checkpoint is torn, or all are, or its reference is missing or another model's.
        """
        self._resumed_from = None
        if resume_from_checkpoint:
            self._resumed_from = self._agree_on_checkpoint(resume_from_checkpoint)
            resume_from_checkpoint = str(self._resumed_from)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _agree_on_checkpoint(self, resume: str | bool) -> Path:
        """What the main process finds: a checkpoint can be written or rotated away while others look."""
        found: list[Any] = [None]
        if self.accelerator.is_main_process:
            try:
                found = [find_checkpoint(resume, Path(cast(str, self.args.output_dir)))]
            except ValueError as error:
                found = [error]
        (result,) = broadcast_object_list(found)
        if isinstance(result, ValueError):
            raise result
        return result

    def _save_checkpoint(self, model, trial):
        run_dir = Path(self._get_output_dir(trial=trial))
        folder = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            open_checkpoint(folder)
        self.accelerator.wait_for_everyone()
        save_reference(folder, self._reference_parameters(), self.accelerator)
        self._save_generated_batch(folder)
        # Older checkpoints go when this one is complete, not before
        with swapped(self.args, save_total_limit=None):
            super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            seal_checkpoint(folder)
            rotate_checkpoints(
                str(run_dir), self.args.save_total_limit, self.state.best_model_checkpoint, use_mtime=True
            )

    def _save_generated_batch(self, folder: Path) -> None:
        """Save the batch whose updates are not done, of every process."""
        updates = cast(int, self.args.steps_per_generation) * self.num_iterations
        if self._step % updates:
            state = {"step": self._step, "processes": self.accelerator.num_processes, "batches": self._buffered_inputs}
            torch.save(state, self._batch_file(folder))

    def _batch_file(self, folder: Path) -> Path:
        return folder / f"batch_{self.accelerator.process_index}.pt"

    def _restore(self) -> None:
        """After TRL has loaded a checkpoint, load what only ours have."""
        folder = self._resumed_from
        if folder is None:
            return
        if parameters := self._reference_parameters():
            if (folder / REFERENCE_NAME).is_file():
                load_reference(folder, parameters)
            elif self.args.sync_ref_model:
                raise ValueError(
                    f"sync_ref_model moves the reference, and the checkpoint {folder} does not hold it: it is of "
                    "another trainer, or of a run without sync_ref_model. Resume it with sync_ref_model=False."
                )
        if self._batch_file(folder).is_file():
            state = torch.load(self._batch_file(folder), map_location="cpu")
            if state["processes"] == self.accelerator.num_processes:
                self._step = state["step"]
                self._buffered_inputs = send_to_device(state["batches"], self.accelerator.device)


class _Restore(TrainerCallback):
    """Restores once models are loaded and prepared, and before the first update."""

    def __init__(self, trainer: CheckpointedTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer._restore()
