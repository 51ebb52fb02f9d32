"""TRL's trainer, with checkpoints from which a run goes on as if it had not ended."""

from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import broadcast_object_list, send_to_device
from transformers import TrainerCallback
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.utils import logging

from .._swapped import swapped
from ..config import GRPOExtConfig
from ..kl.trainer import KLTrainer
from .folders import (
    REFERENCE_NAME,
    batch_file,
    check_complete,
    checkpoint_folder,
    load_reference,
    newest_complete,
    open_checkpoint,
    rotate_checkpoints,
    save_reference,
    seal_checkpoint,
)


logger = logging.get_logger(__name__)

# Settings by which a generated batch is made and cut into updates
_BATCH_SETTINGS = (
    *("per_device_train_batch_size", "steps_per_generation", "num_iterations", "num_generations"),
    *("beta", "kl_estimator", "supervision"),
)


class CheckpointedTrainer(KLTrainer):
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

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """
        TRL's, which resumes from nothing but a complete checkpoint.

        Args:
            resume_from_checkpoint (`str`, `Path` or `bool`, *optional*):
                A checkpoint's folder, or `True` for the newest complete one in `output_dir`.

        Raises:
            ValueError: the checkpoint is torn, or all are, or the reference that it holds is not the one that this
                run needs.
        """
        self._resumed_from = None
        if resume_from_checkpoint:
            self._resumed_from = self._agree_on_checkpoint(resume_from_checkpoint)
            self._check_reference(self._resumed_from)
            resume_from_checkpoint = str(self._resumed_from)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _agree_on_checkpoint(self, resume: str | Path | bool) -> Path:
        """What the main process finds: a checkpoint can be written or rotated away while others look."""
        found: list[Any] = [None]
        if self.accelerator.is_main_process:
            try:
                if resume is True:
                    found = [newest_complete(Path(cast(str, self.args.output_dir)))]
                else:
                    found = [Path(cast(str, resume))]
                    check_complete(found[0])
            except (ValueError, OSError) as error:
                found = [error]
        (result,) = broadcast_object_list(found)
        if isinstance(result, Exception):
            raise result
        return result

    def _check_reference(self, folder: Path) -> None:
        if self.args.beta == 0.0:
            return
        has_reference, needs_reference = (folder / REFERENCE_NAME).is_file(), bool(self._reference_parameters())
        if self.args.sync_ref_model and not has_reference:
            raise ValueError(
                f"sync_ref_model moves the reference, and the checkpoint {folder} does not hold it: it is of another "
                "trainer, or of a run without sync_ref_model. Resume it with sync_ref_model=False."
            )
        if has_reference and not needs_reference:
            raise ValueError(
                f"The checkpoint {folder} holds a reference that had moved, and without sync_ref_model this run would "
                "train against the model as it started. Resume with sync_ref_model=True; with a large "
                "ref_model_sync_steps the reference stays where it is."
            )

    def _save_checkpoint(self, model, trial):
        output_dir = Path(self._get_output_dir(trial=trial))
        folder = checkpoint_folder(output_dir, self.state.global_step)
        if self.args.should_save:
            open_checkpoint(folder)
        self.accelerator.wait_for_everyone()
        save_reference(folder, self._reference_parameters(), write=self.args.should_save)
        self._save_generated_batch(folder)
        # What is pushed is complete, and older checkpoints go when this one is
        with swapped(self.args, save_total_limit=None, push_to_hub=False):
            super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            torch.save(self.args, folder / TRAINING_ARGS_NAME)
            seal_checkpoint(folder)
            best = self.state.best_model_checkpoint
            rotate_checkpoints(output_dir, self.args.save_total_limit, {folder, *([Path(best)] if best else [])})
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder))

    def _batch_settings(self) -> dict[str, Any]:
        return {name: vars(self.args)[name] for name in _BATCH_SETTINGS} | {
            "processes": self.accelerator.num_processes
        }

    def _save_generated_batch(self, folder: Path) -> None:
        """Save the batch whose updates are not done, of every process."""
        if self._step % (cast(int, self.args.steps_per_generation) * self.num_iterations):
            # Processes of other machines may not share a disk with the main one
            folder.mkdir(parents=True, exist_ok=True)
            state = {"settings": self._batch_settings(), "step": self._step, "batches": self._buffered_inputs}
            torch.save(state, batch_file(folder, self.accelerator.process_index))

    def _restore(self) -> None:
        """After TRL has loaded a checkpoint, load what only ours have."""
        folder = self._resumed_from
        if folder is None:
            return
        if (folder / REFERENCE_NAME).is_file() and self.args.beta != 0.0:
            load_reference(folder, self._reference_parameters())
        # Of an earlier call of `train`
        self._step, self._buffered_inputs = 0, None
        path = batch_file(folder, self.accelerator.process_index)
        if not path.is_file():
            return
        state = torch.load(path, map_location="cpu")
        if state["settings"] == self._batch_settings():
            self._step = state["step"]
            self._buffered_inputs = send_to_device(state["batches"], self.accelerator.device)
        else:
            logger.warning(f"The batch in {path} was made with other settings; completions are generated anew.")


class _Restore(TrainerCallback):
    """Restores once models are loaded and prepared, and before the first update."""

    def __init__(self, trainer: CheckpointedTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer._restore()
