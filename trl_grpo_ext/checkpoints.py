"""
Checkpoints that can be trusted: each says whether it is complete, and holds the reference where that has moved.

A checkpoint is written file by file, and a process can be killed between any two. So `checkpoint.json` says
`{"complete": false}` before the first and lists all files with their sizes after the last. A checkpoint without one is
not of this package's making, and is complete if it has the file that transformers writes last.

Beside what TRL saves there are `reference.safetensors`, where the reference cannot be had from elsewhere, and, of a
checkpoint amid the updates on one generated batch, `batch_{rank}.pt` with that batch.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import save_file
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from .sharding import assign_whole, whole


MANIFEST_NAME = "checkpoint.json"
REFERENCE_NAME = "reference.safetensors"

logger = logging.get_logger(__name__)


def open_checkpoint(folder: Path) -> None:
    """Say of a checkpoint, also of one that is written anew, that it is not complete."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_manifest(folder, {"complete": False})


def seal_checkpoint(folder: Path) -> None:
    """Say of a checkpoint that it is complete, with every file in it and its size in bytes."""
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in _files(folder)}
    _write_manifest(folder, {"complete": True, "files": sizes})


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MANIFEST_NAME)


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
    if not (folder / MANIFEST_NAME).is_file():
        try:
            json.loads((folder / TRAINER_STATE_NAME).read_bytes())
        except (OSError, ValueError):
            return f"{TRAINER_STATE_NAME} is missing or torn"
        return None
    manifest = json.loads((folder / MANIFEST_NAME).read_bytes())
    if not manifest["complete"]:
        return "the run ended while it was written"
    for name, size in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
    return None


def find_checkpoint(resume: str | bool, output_dir: Path) -> Path:
    """
    The checkpoint to go on from: the one named, or for `True` the newest complete one in `output_dir`.

    Newer ones that are torn are passed over with a warning.

    Raises:
        ValueError: it is torn, or all are, with what they lack; or there is none.
    """
    if isinstance(resume, str):
        if missing := what_is_missing(Path(resume)):
            raise ValueError(
                f"The checkpoint {resume} is torn: {missing}. Resume from another one, or with "
                "`resume_from_checkpoint=True` from the newest that is complete."
            )
        return Path(resume)
    numbers = {path: path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-") for path in output_dir.glob("*-*")}
    checkpoints = [path for path, number in numbers.items() if number.isdecimal()]
    torn = []
    for path in sorted(checkpoints, key=lambda path: int(numbers[path]), reverse=True):
        missing = what_is_missing(path)
        if missing is None:
            return path
        torn.append(f"{path} ({missing})")
        logger.warning(f"Passing over the torn checkpoint {torn[-1]}.")
    raise ValueError(
        f"There is no complete checkpoint in {output_dir} to resume from. Torn ones: {', '.join(torn) or 'none'}."
    )


def save_reference(folder: Path, parameters: dict[str, torch.Tensor], accelerator: Accelerator) -> None:
    """Save the reference's parameters, whole, from the main process; all processes take part."""
    values = {}
    for name, parameter in parameters.items():
        value = whole(parameter)
        if accelerator.is_main_process:
            values[name] = value
    if accelerator.is_main_process:
        save_file(values, folder / REFERENCE_NAME)


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
