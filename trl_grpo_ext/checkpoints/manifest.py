"""
`checkpoint.json`, the manifest of a checkpoint: whether it is complete, and the size of each of its files.

A checkpoint is written file by file, and a process can be killed between any two. So the manifest says
`{"complete": false}` before the first file is written, and `{"complete": true, "files": {...}}` after the last.
"""

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from transformers.trainer import TRAINER_STATE_NAME


MANIFEST_NAME = "checkpoint.json"
# Transformers keeps this file in a checkpoint that it saves because the job is preempted, until all is written
SENTINEL_NAME = "checkpoint-is-incomplete.txt"
# Files from which transformers loads a model's weights. Those of the first pattern that matches any are loaded
_WEIGHTS = (
    r"global_step\d+/.*model_states\.pt",
    r"pytorch_model_fsdp.*",
    r"(adapter_|pytorch_)?model[.-][^/]*",
    # Of adapters that are not named "default"
    r"[^/]+/adapter_model\.[^/]*",
)


class Manifest(NamedTuple):
    """
    Content of a `checkpoint.json`.

    Args:
        complete (`bool`):
            Whether every file of the checkpoint was written.
        sizes (`dict[str, int]`):
            Bytes of each file when the checkpoint was complete, by the file's path in the folder.
        written_ns (`int`):
            When the manifest was written, in nanoseconds.
    """

    complete: bool
    sizes: dict[str, int]
    written_ns: int


def read_manifest(folder: Path) -> Manifest | None:
    """
    The manifest of a checkpoint.

    Returns:
        [`Manifest`]: `None` if the folder has none, or one that cannot be read.
    """
    path = folder / MANIFEST_NAME
    try:
        content = json.loads(path.read_bytes())
        return Manifest(content["complete"] is True, dict(content.get("files", {})), path.stat().st_mtime_ns)
    except (OSError, ValueError, TypeError, KeyError):
        return None


def mark_incomplete(folder: Path) -> None:
    """Write the manifest of a checkpoint that is about to be written, or deleted."""
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder, {"complete": False})


def mark_complete(folder: Path) -> None:
    """Write the manifest of a checkpoint whose files are all written, with the size of each."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in (MANIFEST_NAME, SENTINEL_NAME))
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in sorted(files)}
    _write(folder, {"complete": True, "files": sizes})


def _write(folder: Path, manifest: dict) -> None:
    # Renamed, so that a process that is killed leaves the old manifest or the new one, and never a part of one
    unfinished = folder / f".{MANIFEST_NAME}"
    with unfinished.open("w") as file:
        json.dump(manifest, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(folder / MANIFEST_NAME)


def incompleteness(folder: Path) -> str | None:
    """
    Why a folder cannot be resumed from, or `None` if it can.

    A checkpoint without a manifest is another trainer's. It is complete if it has `trainer_state.json`, the last file
    that transformers writes.
    """
    if not folder.is_dir():
        return "there is no such folder"
    if (folder / SENTINEL_NAME).exists():
        return f"it has a {SENTINEL_NAME}"
    manifest = read_manifest(folder)
    if manifest is not None:
        return None if manifest.complete else "it was not complete when its run ended, or is still being written"
    if (folder / MANIFEST_NAME).exists():
        return f"{MANIFEST_NAME} cannot be read"
    try:
        json.loads((folder / TRAINER_STATE_NAME).read_bytes())
    except FileNotFoundError:
        return f"it has neither {MANIFEST_NAME} nor {TRAINER_STATE_NAME}"
    except (OSError, ValueError):
        return f"{TRAINER_STATE_NAME} cannot be read"
    return None


def missing_required(folder: Path, manifest: Manifest) -> list[str]:
    """Files of a complete checkpoint that are gone, and without which transformers cannot resume."""
    required = {TRAINER_STATE_NAME, *_weights(manifest.sizes)}
    return [name for name in _missing(folder, manifest) if name in required]


def edits(folder: Path, manifest: Manifest) -> list[str]:
    """What differs from the complete checkpoint that was saved, one phrase for each file."""
    phrases = [f"{name} is missing" for name in _missing(folder, manifest)]
    for name, size in manifest.sizes.items():
        path = folder / name
        if path.is_file() and path.stat().st_size != size:
            phrases.append(f"{name} has {path.stat().st_size} bytes instead of {size}")
    return phrases


def _missing(folder: Path, manifest: Manifest) -> list[str]:
    return [name for name in manifest.sizes if not (folder / name).is_file()]


def _weights(names: Iterable[str]) -> list[str]:
    for pattern in _WEIGHTS:
        if found := [name for name in names if re.fullmatch(pattern, name)]:
            return found
    return []
