"""The report of a run, for the trackers that can show it."""

import importlib
from collections.abc import Sequence
from pathlib import Path

from transformers import TrainerState
from transformers.utils import logging

from .figures import STATE_NAME
from .page_of_run import PAGE_NAME, write_page


logger = logging.get_logger(__name__)

# Those that have a class `Html` and show it with its scripts. TensorBoard shows text only
SHOW_PAGES = ("trackio", "wandb")
REPORT_KEY = "credit_report"


def log_report(run_folder: Path, state: TrainerState, report_to: Sequence[str]) -> None:
    """
    Save the trainer's log, from which the report takes its curves, and log the report to trackers that show pages.

    Whatever goes wrong is a warning: the training is done, and its model is still to be saved.

    Args:
        run_folder (`Path`):
            The run's `output_dir`, with the folder `credit`.
        state (`TrainerState`):
            Of the trainer.
        report_to (`Sequence[str]`):
            The trackers of the run, which must not have ended.
    """
    try:
        state.save_to_json(str(run_folder / STATE_NAME))
        trackers = [name for name in SHOW_PAGES if name in report_to]
        if trackers:
            write_page(run_folder, run_folder / PAGE_NAME)
        for name in trackers:
            tracker = importlib.import_module(name)
            page = tracker.Html(str(run_folder / PAGE_NAME), inject=False)
            # Transformers has made this the axis of all that is logged
            tracker.log({REPORT_KEY: page, "train/global_step": state.global_step})
    except Exception as error:
        logger.warning(
            f"The report of {run_folder} is not logged: {type(error).__name__}: {error} "
            f"`python -m trl_grpo_ext.report {run_folder}` makes it from the log of credit."
        )
