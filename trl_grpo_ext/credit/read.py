"""Read the log of credit of a run's folder, also of one that is still running or was killed."""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
from pyarrow import parquet

from .columns import COLUMNS, FORMAT, METADATA_KEY
from .log import FOLDER


_NAME = re.compile(r"(train|eval)_(\d+)\.parquet")


class CreditStep(NamedTuple):
    """
    What was recorded at one step.

    Args:
        mode (`str`):
            `"train"` or `"eval"`.
        step (`int`):
            The optimizer step.
        settings (`dict[str, Any]`):
            Of the run, and the time of writing, `written`.
        path (`Path`):
            The file.
    """

    mode: str
    step: int
    settings: dict[str, Any]
    path: Path

    def rows(self) -> list[dict[str, Any]]:
        """Each completion's row; see `credit/columns.py` for what is in it."""
        return parquet.read_table(self.path, columns=list(COLUMNS)).to_pylist()


class CreditLog(NamedTuple):
    """
    What the folder of a run holds.

    Args:
        steps (`list[CreditStep]`):
            By mode and step; first training.
        passed_over (`dict[str, str]`):
            The reason for each file that was not read, by its name.
    """

    steps: list[CreditStep]
    passed_over: dict[str, str]


def read_credit(run_folder: str | Path) -> CreditLog:
    """
    The recorded steps of a run.

    Files that are no step's are left alone. A step's file that cannot be read, is of another format, or lies after a
    step that was written later (of a run before that got further), is passed over with the reason.

    Args:
        run_folder (`str` or `Path`):
            The run's `output_dir`.

    Raises:
        FileNotFoundError: it has no folder `credit`.
    """
    folder = Path(run_folder) / FOLDER
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not there: train with log_credit=2, or another number of groups.")
    found: list[CreditStep] = []
    passed_over: dict[str, str] = {}
    for path in sorted(folder.iterdir()):
        name = _NAME.fullmatch(path.name)
        if name is None:
            continue
        try:
            found.append(CreditStep(name[1], int(name[2]), read_settings(path), path))
        except (pa.ArrowException, OSError, ValueError) as error:
            passed_over[path.name] = str(error)
    steps: list[CreditStep] = []
    for mode in ("train", "eval"):
        of_mode = sorted([step for step in found if step.mode == mode], key=lambda step: step.step)
        current = without_stale(of_mode)
        steps += current
        for step in of_mode:
            if step not in current:
                passed_over[step.path.name] = "of an earlier run in this folder: a step before it was written later"
    return CreditLog(steps, passed_over)


def without_stale(steps: list[CreditStep]) -> list[CreditStep]:
    """Steps of one mode in their order, without those that were written before an earlier step was."""
    kept: list[CreditStep] = []
    earliest = float("-inf")
    for step in steps:
        if step.settings["written"] >= earliest:
            kept.append(step)
            earliest = step.settings["written"]
    return kept


def read_settings(path: Path) -> dict[str, Any]:
    """
    The settings in the metadata of a step's file.

    Raises:
        ValueError: the file is of another program or format.
        OSError, `pyarrow.ArrowException`: it is no parquet file, or not whole.
    """
    found = parquet.read_schema(path)
    metadata = found.metadata or {}
    if METADATA_KEY not in metadata:
        raise ValueError("not a file of this package")
    settings = json.loads(metadata[METADATA_KEY])
    if settings["format"] != FORMAT or not set(COLUMNS) <= set(found.names):
        raise ValueError(f"written in format {settings['format']}, and this version reads {FORMAT}")
    return settings
