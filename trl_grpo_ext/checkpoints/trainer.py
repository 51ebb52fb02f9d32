"""TRL's trainer, with checkpoints from which a run goes on as if it had not ended."""

from collections import deque
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import broadcast_object_list, send_to_device
from torch import nn
from torch.utils.data import Sampler
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.utils import logging

from .._swapped import swapped
from ..distributed import total
from ..kl.reference import keep_requires_grad
from ..kl.trainer import KLTrainer
from .folders import checkpoint_folder, find_checkpoint, rotate_checkpoints
from .manifest import mark_complete, mark_incomplete
from .reference import REFERENCE_NAME, load_reference, save_reference
from .saved_batch import SavedBatch, batch_file, batch_settings, changed_settings, load_batch, save_batch
from .weights import load_converted_weights


logger = logging.get_logger(__name__)


class CheckpointedTrainer(KLTrainer):
    """
    [`~trl.GRPOTrainer`] whose runs resume as if they had not ended, on the same number of processes.

    Beside what TRL saves, a checkpoint says in `checkpoint.json` whether it is complete. It holds the KL's reference
    if that has moved, and, if it was saved during the updates on a generated batch, that batch. The order of the
    prompts in later epochs is the uninterrupted run's too.

    Args:
        **kwargs:
            The arguments of [`KLTrainer`], by name.
    """

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self._resumed_from: Path | None = None
        self._train_sampler: Sampler | None = None
        self.add_callback(_Restore(self))

    # -----------------------------------------------------------------------------------------------------------------
    # Resuming

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """
        Train as TRL does, and resume from nothing but a complete checkpoint.

        Args:
            resume_from_checkpoint (`str`, `Path` or `bool`, *optional*):
                A checkpoint's folder, or `True` for the newest complete one in `output_dir`. Incomplete ones are
                passed over with a warning each.

        Raises:
            ValueError: the checkpoint is incomplete, or no checkpoint is complete, or the checkpoint lacks a file or
                the reference that this run needs; with the reason.
        """
        self._resumed_from = None
        if resume_from_checkpoint:
            self._resumed_from = self._agree_on_checkpoint(resume_from_checkpoint)
            self._check_reference(self._resumed_from)
            resume_from_checkpoint = str(self._resumed_from)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _agree_on_checkpoint(self, resume: str | Path | bool) -> Path:
        """The checkpoint that the main process finds; others might look while a folder is written or deleted."""
        found: list[Any] = [None]
        if self.accelerator.is_main_process:
            try:
                found = [find_checkpoint(resume, Path(cast(str, self.args.output_dir)))]
            except (ValueError, OSError) as error:
                found = [error]
        (result,) = broadcast_object_list(found)
        if isinstance(result, Exception):
            raise result
        return result

    def _check_reference(self, folder: Path) -> None:
        if self.args.beta == 0.0:
            return
        has_reference = (folder / REFERENCE_NAME).is_file()
        if self.args.sync_ref_model and not has_reference:
            raise ValueError(
                f"sync_ref_model moves the reference, and the checkpoint {folder} does not hold it: it is of another "
                "trainer, or of a run without sync_ref_model. Resume it with sync_ref_model=False."
            )
        if has_reference and not self._reference_parameters():
            raise ValueError(
                f"The checkpoint {folder} holds a reference that had moved, and without sync_ref_model this run would "
                "train against the model as it started. Resume with sync_ref_model=True; with a large "
                "ref_model_sync_steps the reference stays where it is."
            )

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        # Transformers activates a loaded adapter, whereupon PEFT lets all of it train
        with keep_requires_grad(cast(nn.Module, self.model)):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_converted_weights(resume_from_checkpoint)

    def _load_best_model(self):
        with keep_requires_grad(cast(nn.Module, self.model)):
            super()._load_best_model()
        self._load_converted_weights(self.state.best_model_checkpoint)

    def _load_converted_weights(self, folder: Any) -> None:
        # PEFT, FSDP and DeepSpeed load files of their own, which have the modules' names
        if isinstance(self.model, PreTrainedModel) and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            load_converted_weights(self.model, Path(folder))

    def _get_train_sampler(self, dataset=None):
        self._train_sampler = super()._get_train_sampler(dataset)
        return self._train_sampler

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        epochs, batches = super()._init_training_state(*args, **kwargs)
        if self._resumed_from is not None:
            if self._train_sampler is not None:
                skip_epochs(self._train_sampler, epochs)
            # TRL counts from 0, and would generate in the middle of the batches that share their prompts
            self._step = batches
            # Of an earlier call of `train`
            self._buffered_inputs = None
        return epochs, batches

    def _restore(self) -> None:
        """After TRL has loaded a checkpoint, load what only this package has saved in it."""
        folder = self._resumed_from
        if folder is None:
            return
        if (folder / REFERENCE_NAME).is_file() and self.args.beta != 0.0:
            load_reference(folder, self._reference_parameters())
        if self._is_during_updates:
            self._restore_batch(folder)

    def _restore_batch(self, folder: Path) -> None:
        """Go on with the generated batch, if its settings are this run's and every process has its part of it."""
        saved = load_batch(batch_file(folder, self.accelerator.process_index))
        changes = [] if saved is None else changed_settings(saved.settings, self._batch_settings())
        usable = saved is not None and not changes
        # Processes generate together: one that did so alone would wait for the others
        flag = torch.tensor([float(usable)], device=self.accelerator.device)
        (users,) = total(self.accelerator, flag)
        if saved is not None and users == self.accelerator.num_processes:
            self._buffered_inputs = send_to_device(saved.batches, self.accelerator.device)
        elif self.accelerator.is_main_process:
            reason = "; ".join(changes) or "the batch is not there for every process"
            logger.warning(
                f"The checkpoint {folder} was saved during the updates on a generated batch. The completions of that "
                f"batch are generated anew: {reason}."
            )

    # -----------------------------------------------------------------------------------------------------------------
    # Saving

    def _save_checkpoint(self, model, trial):
        output_dir = Path(self._get_output_dir(trial=trial))
        folder = checkpoint_folder(output_dir, self.state.global_step)
        if self.args.should_save:
            mark_incomplete(folder)
            # Of a run before that saved at the same step
            for path in (folder / REFERENCE_NAME, *folder.glob("batch_*.pt")):
                path.unlink(missing_ok=True)
        self.accelerator.wait_for_everyone()
        save_reference(folder, self._reference_parameters(), write=self.args.should_save)
        if self._is_during_updates:
            batch = SavedBatch(self._batch_settings(), self._buffered_inputs)
            save_batch(batch_file(folder, self.accelerator.process_index), batch)
        # Transformers would push and rotate before TRL has written its last file
        with swapped(self.args, save_total_limit=None, push_to_hub=False):
            super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            # Transformers has saved the swapped settings
            torch.save(self.args, folder / TRAINING_ARGS_NAME)
            mark_complete(folder)
            self._rotate_checkpoints(output_dir, self.args.save_total_limit, newest=folder)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder))

    def _finalize_training(self, trial, *args: Any, **kwargs: Any) -> Any:
        limit = self.args.save_total_limit
        # Transformers would delete every folder named as a checkpoint but the best one's
        with swapped(self.args, save_total_limit=None):
            output = super()._finalize_training(trial, *args, **kwargs)
        best = self.state.best_model_checkpoint
        if self.args.should_save and limit == 1 and best is not None:
            self._rotate_checkpoints(Path(self._get_output_dir(trial)), limit, newest=Path(best))
        return output

    def _rotate_checkpoints(self, output_dir: Path, limit: int | None, newest: Path) -> None:
        best = self.state.best_model_checkpoint
        rotate_checkpoints(output_dir, limit, newest, None if best is None else Path(best))

    @property
    def _is_during_updates(self) -> bool:
        """Whether updates on the generated batch are still to come."""
        return self._step % (cast(int, self.args.steps_per_generation) * self.num_iterations) != 0

    def _batch_settings(self) -> dict[str, Any]:
        return batch_settings(
            self.args,
            sources=self.reward_func_names,
            # Not those of this step, which a callback may schedule
            weights=cast(Any, self.args.reward_weights) or [1.0] * len(self.reward_func_names),
            processes=self.accelerator.num_processes,
        )


def skip_epochs(sampler: Sampler, epochs: int) -> None:
    """
    Bring a new sampler to where a run of that many epochs left its own.

    TRL's sampler draws the order of each epoch from a generator of its own, whose state is in no checkpoint.
    """
    for _ in range(epochs):
        # Consumes the iterator
        deque(sampler, maxlen=0)


class _Restore(TrainerCallback):
    """Restores once models are loaded and prepared, and before the first update."""

    def __init__(self, trainer: CheckpointedTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer._restore()
