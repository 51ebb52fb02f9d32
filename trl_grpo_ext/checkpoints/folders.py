"""
Folders of checkpoints: which are complete, and what this package adds to them.

A checkpoint is written file by file, and a process can be killed between any two. So `checkpoint.json` says
`{"complete": false}` before the first and lists all files with their sizes after the last. A checkpoint without one is
not of this package's making, and is complete if it has the file that transformers writes last.

Beside what TRL saves there is `reference/`, where the reference cannot be had from elsewhere, and, in a checkpoint
amid the updates on one generated batch, `batch_{rank}.pt` with that batch.
"""

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ..distributed import assign_whole, whole


MANIFEST_NAME = "checkpoint.json"
# In a folder of its own: servers load every safetensors file that lies beside the model's
REFERENCE_NAME = "reference/parameters.safetensors"
# Transformers keeps it there while it saves a job that is preempted
_SENTINEL_NAME = "checkpoint-is-incomplete.txt"

logger = logging.get_logger(__name__)


def checkpoint_folder(output_dir: Path, step: int) -> Path:
    """As transformers names it."""
    return output_dir / f"{PREFIX_CHECKPOINT_DIR}-{step}"


def batch_file(folder: Path, rank: int) -> Path:
    """Where a process keeps the generated batch that it was amid."""
    return folder / f"batch_{rank}.pt"


# ---------------------------------------------------------------------------------------------------------------------
# Complete or torn


def open_checkpoint(folder: Path) -> None:
    """Say of a checkpoint that it is not complete; one that is written anew loses what only this package wrote."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_manifest(folder, {"complete": False})
    for path in (folder / REFERENCE_NAME, *folder.glob("batch_*.pt")):
        path.unlink(missing_ok=True)


def seal_checkpoint(folder: Path) -> None:
    """Say of a checkpoint that it is complete, with every file in it and its size in bytes."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in (MANIFEST_NAME, _SENTINEL_NAME))
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in sorted(files)}
    _write_manifest(folder, {"complete": True, "files": sizes})


def _write_manifest(folder: Path, manifest: dict) -> None:
    """All at once: whoever reads meanwhile, or after this process was killed, finds the old one or the new one."""
    unfinished = folder / f".{MANIFEST_NAME}"
    with unfinished.open("w") as file:
        json.dump(manifest, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(folder / MANIFEST_NAME)


def what_is_missing(folder: Path) -> str | None:
    """What a checkpoint lacks to be complete, or `None`."""
    if not folder.is_dir():
        return "there is no such folder"
    if (folder / _SENTINEL_NAME).exists():
        return f"it has a {_SENTINEL_NAME}"
    name = MANIFEST_NAME if (folder / MANIFEST_NAME).exists() else TRAINER_STATE_NAME
    try:
        content = json.loads((folder / name).read_bytes())
        if name == TRAINER_STATE_NAME:
            return None
        complete, sizes = content["complete"], content.get("files", {})
    except (OSError, ValueError, TypeError, KeyError):
        return f"{name} is missing or torn"
    if not complete:
        return "it is being written, or the run ended while it was"
    for file, size in sizes.items():
        found = (folder / file).stat().st_size if (folder / file).is_file() else None
        if found != size:
            return f"{file} is missing" if found is None else f"{file} has {found} bytes instead of {size}"
    return None


def check_complete(folder: Path) -> None:
    """Raise `ValueError` that says what a checkpoint lacks, if anything."""
    if missing := what_is_missing(folder):
        raise ValueError(
            f"{folder} is not a complete checkpoint: {missing}. Resume from another one, or with "
            "`resume_from_checkpoint=True` from the newest that is complete."
        )


def newest_complete(output_dir: Path) -> Path:
    """
    The checkpoint with the largest step that is complete; torn ones are passed over with a warning each.

    Raises:
        ValueError: there is none, with what each lacks.
    """
    torn = []
    for folder in reversed(_checkpoints(output_dir)):
        missing = what_is_missing(folder)
        if missing is None:
            return folder
        torn.append(f"{folder} ({missing})")
        logger.warning(f"Passing over the torn checkpoint {torn[-1]}.")
    raise ValueError(
        f"There is no complete checkpoint in {output_dir} to resume from. Torn ones: {', '.join(torn) or 'none'}."
    )


def rotate_checkpoints(output_dir: Path, limit: int | None, keep: Iterable[Path]) -> None:
    """
    Delete all but the `limit` checkpoints that were completed last, `keep` among them, and the torn ones.

    Transformers' own counts a torn checkpoint as one, and can delete the only complete one for it.
    """
    if limit is None or limit <= 0:
        return
    protected = set(keep)
    others = [folder for folder in _checkpoints(output_dir) if folder not in protected]
    torn = [folder for folder in others if what_is_missing(folder) is not None]
    # A run that was resumed from an early checkpoint has later ones of a run before
    complete = sorted(
        (folder for folder in others if folder not in torn), key=lambda folder: folder.stat().st_mtime_ns
    )
    for folder in [*torn, *complete[: max(len(complete) + len(protected) - limit, 0)]]:
        shutil.rmtree(folder, ignore_errors=True)


def _checkpoints(output_dir: Path) -> list[Path]:
    """By step."""
    steps = {path: path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-") for path in output_dir.glob("checkpoint-*")}
    return sorted((path for path, step in steps.items() if step.isdecimal()), key=lambda path: int(steps[path]))


# ---------------------------------------------------------------------------------------------------------------------
# The reference


def save_reference(folder: Path, parameters: dict[str, torch.Tensor], write: bool) -> None:
    """Save the reference's parameters, whole, where `write`; all processes take part."""
    values = {}
    for name, parameter in parameters.items():
        value = whole(parameter)
        if write:
            values[name] = value
    if values:
        path = folder / REFERENCE_NAME
        path.parent.mkdir(exist_ok=True)
        save_file(values, path)


def load_reference(folder: Path, parameters: dict[str, torch.Tensor]) -> None:
    """
    Give the reference's parameters, sharded or not, the values of a checkpoint.

    Raises:
        ValueError: it is the reference of another model; with the names that differ.
    """
    path = folder / REFERENCE_NAME
    with safe_open(path, framework="pt") as file:
        if differing := sorted(set(file.keys()) ^ parameters.keys()):
            raise ValueError(f"{path} is the reference of another model: {', '.join(differing[:5])} differ(s).")
        for name, parameter in parameters.items():
            assign_whole(parameter, file.get_tensor(name))
