"""The folders of a run's checkpoints: which one to resume from, and which ones to delete."""

import shutil
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints
from transformers.utils import logging

from .manifest import (
    MANIFEST_NAME,
    edits,
    incompleteness,
    mark_incomplete,
    missing_required,
    read_manifest,
)


logger = logging.get_logger(__name__)


def checkpoint_folder(output_dir: Path, step: int) -> Path:
    """The folder of a checkpoint, named as transformers names it."""
    return output_dir / f"{PREFIX_CHECKPOINT_DIR}-{step}"


# ---------------------------------------------------------------------------------------------------------------------
# Resuming


def find_checkpoint(resume: str | Path | bool, output_dir: Path) -> Path:
    """
    The checkpoint to resume from, which is complete.

    A checkpoint that was edited since it was saved is taken as transformers takes it, with one warning that names the
    files.

    Args:
        resume (`str`, `Path` or `bool`):
            A checkpoint's folder, or `True` for the newest complete one in `output_dir`.
        output_dir (`Path`):
            Folder of the run.

    Returns:
        `Path`: the checkpoint's folder.

    Raises:
        ValueError: the checkpoint is incomplete, or no checkpoint is complete, or a file is missing that nothing can
            be resumed without; with the reason.
    """
    folder = newest_complete(output_dir) if isinstance(resume, bool) else Path(resume)
    if reason := incompleteness(folder):
        raise ValueError(
            f"{folder} is not a complete checkpoint: {reason}. Resume from another one, or with "
            "`resume_from_checkpoint=True` from the newest that is complete."
        )
    manifest = read_manifest(folder)
    if manifest is None:
        return folder
    if missing := missing_required(folder, manifest):
        raise ValueError(
            f"The checkpoint {folder} cannot be resumed without {', '.join(missing)}, which it had when it was saved. "
            "Restore what is missing, or pass the path of another checkpoint as `resume_from_checkpoint`."
        )
    if differences := edits(folder, manifest):
        logger.warning(
            f"The checkpoint {folder} was edited since it was saved: {'; '.join(differences)}. The run resumes with "
            "what is there. A file that has become shorter may have been cut short."
        )
    return folder


def newest_complete(output_dir: Path) -> Path:
    """
    The complete checkpoint with the largest step; incomplete ones are passed over with a warning each.

    Raises:
        ValueError: no checkpoint is complete; with the reason for each.
    """
    passed_over = []
    for folder in reversed(_checkpoints(output_dir)):
        reason = incompleteness(folder)
        if reason is None:
            return folder
        passed_over.append(f"{folder} ({reason})")
        logger.warning(f"Passing over the incomplete checkpoint {passed_over[-1]}.")
    found = f"incomplete are {', '.join(passed_over)}" if passed_over else "it holds no checkpoint at all"
    raise ValueError(
        f"There is no complete checkpoint in {output_dir} to resume from: {found}. Train without "
        "`resume_from_checkpoint`, or pass the path of a checkpoint."
    )


def _checkpoints(output_dir: Path) -> list[Path]:
    """Folders that are named as checkpoints, by step."""
    prefix = f"{PREFIX_CHECKPOINT_DIR}-"
    folders = [path for path in output_dir.glob(f"{prefix}*") if path.name.removeprefix(prefix).isdecimal()]
    return sorted(folders, key=lambda path: int(path.name.removeprefix(prefix)))


# ---------------------------------------------------------------------------------------------------------------------
# Deleting


def rotate_checkpoints(output_dir: Path, limit: int | None, newest: Path, best: Path | None) -> None:
    """
    Delete old checkpoints, as transformers does with `save_total_limit`, and incomplete ones that are older still.

    The complete checkpoints count, in transformers' order, by the time at which they were written. The oldest are
    deleted until `limit` are left; `newest` and `best` stay. An incomplete checkpoint does not count, and is deleted
    if `newest` was completed after it. A folder without a manifest of this package neither counts nor is deleted: it
    may hold another trainer's checkpoint, or a model.

    Args:
        output_dir (`Path`):
            Folder of the run.
        limit (`int`, *optional*):
            Number of complete checkpoints to keep. With `None` or 0 nothing is deleted.
        newest (`Path`):
            The checkpoint that was saved last.
        best (`Path`, *optional*):
            The checkpoint with the best metric.
    """
    if limit is None or limit <= 0:
        return
    folders = [Path(folder) for folder in sort_checkpoints(str(output_dir), use_mtime=True)]
    manifests = {folder: manifest for folder in folders if (manifest := read_manifest(folder))}
    if unmanaged := [folder.name for folder in _checkpoints(output_dir) if folder not in manifests]:
        logger.warning_once(
            f"save_total_limit leaves {', '.join(unmanaged)} in {output_dir} alone: no {MANIFEST_NAME} in there says "
            "that this package has saved it."
        )
    protected = {path.resolve() for path in (newest, best) if path is not None}
    complete = [folder for folder, manifest in manifests.items() if manifest.complete]
    deletable = [folder for folder in complete if folder.resolve() not in protected]
    completed = read_manifest(newest)
    incomplete = [
        folder
        for folder, manifest in manifests.items()
        if completed is not None and not manifest.complete and manifest.written_ns < completed.written_ns
    ]
    for folder in [*incomplete, *deletable[: max(len(complete) - limit, 0)]]:
        _delete(folder)


def _delete(folder: Path) -> None:
    """Delete a checkpoint so that a process that is killed meanwhile leaves one that is marked incomplete."""
    try:
        mark_incomplete(folder)
        for path in folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != MANIFEST_NAME:
                path.unlink()
        shutil.rmtree(folder)
    except OSError as error:
        # A full or slow disk is no reason to end a run
        logger.warning(f"The old checkpoint {folder} could not be deleted: {error}.")
